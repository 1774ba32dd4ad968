"""The documentation, the models and the fast path beside them say the same."""

import json
import re
from typing import Any, get_args

import httpx
import jsonschema_rs
import orjson
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app import schemas
from app.domain import Order, OrderIds, OrderStatus, PlacedOrder
from app.errors import ServiceError
from app.main import create_app
from app.parsing import parse_batch, parse_order
from app.schemas import NewBatch, NewBatchOrder, NewOrder
from app.settings import Settings
from app.timestamp import timestamp

# Section 3.3 of the contract: every documented route, and the statuses that it may answer.
ANY = {400, 408, 415, 422, 431, 500, 501}
ROUTES = {
    "POST /orders": {201, 401, 409, 413, 503, 504} | ANY,
    "POST /orders/batch": {200, 401, 413, 503} | ANY,
    "GET /orders/{order_id}": {200, 401, 404, 503, 504} | ANY,
    "GET /orders": {200, 401, 503, 504} | ANY,
    "POST /orders/{order_id}/cancel": {200, 401, 404, 409, 503, 504} | ANY,
    "GET /products/{product_id}": {200, 401, 404, 503, 504} | ANY,
    "GET /products": {200, 401, 503, 504} | ANY,
    "GET /livez": {200} | ANY,
    "GET /readyz": {200, 503} | ANY,
    "GET /metrics": {200} | ANY,
}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(Settings.load(database_url="postgresql:///unused"))


@pytest.fixture(scope="module")
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def test_the_documented_routes_are_the_contracts(document: dict[str, Any]) -> None:
    """Each route with its statuses, and no other; every refusal of the API is a problem."""
    documented = {
        f"{method.upper()} {path}": {int(status) for status in operation["responses"]}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert documented == ROUTES
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert set(response["content"]) == {"application/problem+json"}
                    assert ("Retry-After" in response["headers"]) == (status == "503")
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


def test_every_route_is_documented(app: FastAPI, document: dict[str, Any]) -> None:
    """What is not in /openapi.json is the documentation itself."""
    served = {route.path_format for route in app.routes if isinstance(route, APIRoute)}
    assert served - set(document["paths"]) == {"/", "/docs", "/openapi.json"}


def test_every_example_is_valid(document: dict[str, Any]) -> None:
    """Each example, wherever it stands, is what its schema asks for."""
    checked = 0

    def check(node: object) -> None:
        nonlocal checked
        if isinstance(node, list):
            for child in node:
                check(child)
        if isinstance(node, dict):
            for example in node.get("examples", []) if isinstance(node.get("examples"), list) else []:
                jsonschema_rs.validate({**node, "components": document["components"]}, example)
                checked += 1
            for child in node.values():
                check(child)

    check(document)
    assert checked >= 10
    NewOrder.model_validate(document["components"]["schemas"]["NewOrder"]["examples"][0])


async def test_the_documentation_works_offline(app: FastAPI) -> None:
    """The page, its script and its style name no other host, and are all there."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        page = (await client.get("/docs")).text
        assert "://" not in page
        links = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert {"/docs/assets/swagger-ui-bundle.js", "/docs/assets/swagger-ui.css"} <= set(links)
        for link in links:
            if link.startswith("/"):
                assert (await client.get(link)).status_code == 200
        style = (await client.get("/docs/assets/swagger-ui.css")).text
        assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//|@import", style)
        assert "url: '/openapi.json'" in page
        assert (await client.get("/openapi.json")).json() == app.openapi()


def test_the_error_types_are_the_contracts(document: dict[str, Any]) -> None:
    """The documented `error_type`s are those that some refusal carries."""

    def tree(kind: type[ServiceError]) -> set[type[ServiceError]]:
        return {kind}.union(*map(tree, kind.__subclasses__()))

    carried = {kind.error_type for kind in tree(ServiceError) if hasattr(kind, "error_type")}
    assert set(document["components"]["schemas"]["Problem"]["properties"]["error_type"]["enum"]) == carried


# --- what is accepted -------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1005) | st.just(10**30) | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=5,
)
_anything = _json | st.sampled_from(
    [
        "",
        "c" * 64,
        "c" * 65,
        "k" * 255,
        "k" * 256,
        "c\x00",
        " ",
        " \t\u3000",
        " c",
        0,
        1000,
        1001,
        2.0,
        1e3,
        2.5,
    ]
)
_line = st.fixed_dictionaries(
    {"product_id": st.sampled_from(["SKU-0001", "SKU-0002", "SKU-0003"]), "quantity": st.integers(1, 1000)}
)
_valid = st.fixed_dictionaries(
    {"customer_id": st.sampled_from(["c-1", "ä" * 64]), "items": st.lists(_line, min_size=1, max_size=2)},
    optional={"idempotency_key": st.sampled_from(["k", "k" * 255, None])},
)
_FIELDS = st.sampled_from(["customer_id", "items", "idempotency_key", "coupon"])
_LINE_FIELDS = st.sampled_from(["product_id", "quantity", "price_cents"])


def _spoil(valid: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    return {**valid, field: value}


def _spoil_line(valid: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    return {**valid, "items": [*valid["items"], {**valid["items"][0], field: value}]}


# Mostly one defect at a time: an order with several would be refused for whichever is noticed.
_order = st.one_of(
    _valid,
    st.builds(_spoil, _valid, _FIELDS, _anything),
    st.builds(_spoil_line, _valid, _LINE_FIELDS, _anything),
    _json,
)


def _verdict(parse: object, body: bytes) -> object:
    """What *parse* reads in *body*; None where it refuses it."""
    try:
        return parse(body)  # type: ignore[operator]
    except (ValidationError, ServiceError):
        return None


@given(_order)
def test_both_routes_and_the_models_agree(order: object) -> None:
    """One order has one verdict: by its model, alone, in a batch, and in a batch with a bad neighbour."""
    try:
        text = orjson.dumps(order)
    except TypeError:  # an integer of 30 digits
        text = json.dumps(order).encode()
    alone = _verdict(parse_order, text)
    assert alone == _verdict(NewOrder.model_validate_json, text)

    by_model = _verdict(lambda body: NewBatch.model_validate_json(body).orders[0], b'{"orders":[%b]}' % text)
    batched = parse_batch(b'{"orders":[%b]}' % text)[0]
    mixed = parse_batch(b'{"orders":[0,%b]}' % text)[1]
    for found in (batched, mixed):
        assert (found if isinstance(found, NewBatchOrder) else None) == by_model
    if isinstance(alone, NewOrder):
        assert isinstance(by_model, NewBatchOrder)
        assert (by_model.customer_id, by_model.items) == (alone.customer_id, alone.items)
        assert by_model.idempotency_key is None


@given(_order)
def test_the_documented_schema_agrees_with_the_model(order: object) -> None:
    """What the service accepts the schema accepts; and the other way round, but for a product on two lines."""
    try:
        text = orjson.dumps(order)
    except TypeError:
        text = json.dumps(order).encode()
    accepted = _verdict(NewOrder.model_validate_json, text) is not None
    valid = _VALIDATOR.is_valid(json.loads(text))
    if accepted:
        assert valid
    elif valid:
        assert isinstance(order, dict)
        products = [line["product_id"] for line in order["items"]]
        assert len(set(products)) < len(products)


_VALIDATOR = jsonschema_rs.validator_for(NewOrder.model_json_schema())


# --- what is answered -------------------------------------------------------------------------------------------

_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=64)
_stored = st.builds(
    Order,
    id=st.builds(lambda now_ns: OrderIds(lambda: now_ns).next()[0], st.integers(0, 2**62)),
    customer_id=_text,
    status=st.sampled_from(get_args(OrderStatus)),
    currency=st.just("EUR"),
    total_cents=st.integers(0, 2**62),
    lines=st.lists(
        st.tuples(_text, st.integers(1, 1000), st.integers(0, 2**53))
        | st.just(["SKU-0001", 1, 1]),  # from jsonb
        min_size=1,
        max_size=50,
    ),
    created_at=st.builds(timestamp, st.integers(0, 2**62)),
)
_problem = st.sampled_from([kind() for kind in ServiceError.__subclasses__() if hasattr(kind, "error_type")])


@given(_stored)
def test_an_order_is_rendered_as_documented(order: Order) -> None:
    """The fast rendering is the model's own JSON, byte for byte."""
    rendered = schemas.order_json(order)
    assert schemas.Order.model_validate_json(rendered, strict=True).model_dump_json().encode() == rendered


@given(st.lists(st.builds(PlacedOrder, _stored, st.booleans()) | _problem, min_size=1, max_size=5))
def test_a_batch_is_rendered_as_documented(results: list[PlacedOrder | ServiceError]) -> None:
    """The fast rendering is the model's own JSON, byte for byte."""
    rendered = schemas.batch_json(
        [result if isinstance(result, PlacedOrder) else result.problem() for result in results]
    )
    model = schemas.BatchResult.model_validate_json(rendered, strict=True)
    assert model.model_dump_json(exclude_none=True).encode() == rendered


@pytest.mark.parametrize("body", [b"{", b"{}", b'{"customer_id": 1, "items": [{"more": 1}]}'])
def test_a_refusal_is_rendered_as_documented(body: bytes) -> None:
    """A problem with its list of defects is the model's own JSON."""
    with pytest.raises(ServiceError) as refused:
        parse_order(body)
    problem = json.loads(orjson.dumps(refused.value.problem()))
    assert schemas.Problem.model_validate(problem).model_dump(exclude_none=True) == problem
    assert problem["errors"]
