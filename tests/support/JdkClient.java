import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.util.List;

/**
 * Places orders with the JDK's own client as it comes: it offers h2c with every POST until it knows the server.
 *
 * Arguments: the service's URL, and the body. Each answer is a line: its status, and its body.
 */
class JdkClient {
    public static void main(String[] arguments) throws Exception {
        URI orders = URI.create(arguments[0] + "/orders");
        byte[] body = arguments[1].getBytes(StandardCharsets.UTF_8);
        BodyPublisher withLength = BodyPublishers.ofByteArray(body);
        BodyPublisher chunked = BodyPublishers.ofByteArrays(List.of(body));
        for (BodyPublisher publisher : List.of(withLength, chunked)) {
            HttpClient client = HttpClient.newHttpClient();
            for (int number = 0; number < 5; number++) {
                HttpRequest request = HttpRequest.newBuilder(orders)
                    .header("Content-Type", "application/json")
                    .POST(publisher)
                    .build();
                var response = client.send(request, BodyHandlers.ofString());
                System.out.println(response.statusCode() + " " + response.body());
            }
        }
    }
}
