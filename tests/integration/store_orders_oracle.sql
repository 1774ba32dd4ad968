-- The plain way to store a batch, as an oracle for store_orders_v1: it locks, decides each order, and then stores.
--
--   orders: [{"n": 0, "principal", "id", "customer_id", "currency", "total_cents", "lines", "created_at", "key",
--           "hash"}, ...]; n is the order of arrival; no (principal, key) twice.
--   product_ids, quantities: what the whole batch wants, summed by product.
--
-- Answers with a row per order, n counted from 0, verdicts and columns as those of store_orders_v1.
CREATE FUNCTION store_orders_oracle(orders json, product_ids text[], quantities bigint[])
RETURNS TABLE (n int, verdict text, id uuid, currency text, total_cents bigint, lines jsonb, created_at timestamptz)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off  -- small batches, large tables
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    enough   boolean;
    accepted int[];   -- the orders there is stock for; null: all
    inserted uuid[];  -- the orders that are new with this transaction
BEGIN
    SELECT bool_and(locked.stock >= wanted.quantity) AND count(*) = cardinality(product_ids) INTO enough
      FROM (SELECT w.id, w.quantity FROM unnest(product_ids, quantities) AS w (id, quantity) ORDER BY w.id) wanted
     CROSS JOIN LATERAL (SELECT p.stock FROM products p WHERE p.id = wanted.id FOR NO KEY UPDATE) locked;

    IF enough IS NOT TRUE THEN
        -- First come, first served: an order is accepted if the stock covers it and all before it. One that could
        -- not be served even alone does not count against those after it.
        WITH line AS (
            SELECT b.n, l ->> 0 AS product_id, (l ->> 1)::bigint AS quantity, p.stock,
                   bool_and(coalesce(p.stock >= (l ->> 1)::bigint, false)) OVER (PARTITION BY b.n) AS possible
              FROM json_to_recordset(orders) AS b (n int, lines jsonb)
             CROSS JOIN LATERAL jsonb_array_elements(b.lines) AS l
              LEFT JOIN products p ON p.id = l ->> 0
        ), demand AS (
            SELECT line.n, stock, sum(quantity) OVER (PARTITION BY product_id ORDER BY line.n) AS so_far
              FROM line
             WHERE possible
        ), served AS (
            SELECT demand.n FROM demand GROUP BY demand.n HAVING bool_and(so_far <= stock)
        )
        SELECT coalesce(array_agg(served.n), '{}') INTO accepted FROM served;
    END IF;

    WITH stored AS (
        INSERT INTO orders AS o (principal, id, customer_id, status, currency, total_cents, lines, created_at,
                                 idempotency_key, request_hash)
        SELECT b.principal, b.id, b.customer_id, 'confirmed', b.currency, b.total_cents, b.lines, b.created_at,
               b.key, b.hash
          FROM json_to_recordset(orders) AS b (n int, principal text, id uuid, customer_id text, currency text,
               total_cents bigint, lines jsonb, created_at timestamptz, key text, hash text)
         WHERE accepted IS NULL OR b.n = ANY (accepted)
         ORDER BY b.principal, b.key, b.id
            ON CONFLICT DO NOTHING
        RETURNING o.id
    )
    SELECT coalesce(array_agg(stored.id), '{}') INTO inserted FROM stored;

    IF cardinality(inserted) = json_array_length(orders) THEN
        UPDATE products p
           SET stock = p.stock - wanted.quantity
          FROM unnest(product_ids, quantities) AS wanted (id, quantity)
         WHERE p.id = wanted.id;
        RETURN QUERY
        SELECT g.n, 'stored', NULL::uuid, NULL::text, NULL::bigint, NULL::jsonb, NULL::timestamptz
          FROM generate_series(0, cardinality(inserted) - 1) AS g (n);
        RETURN;
    END IF;

    UPDATE products p
       SET stock = p.stock - taken.quantity
      FROM (SELECT l ->> 0 AS product_id, sum((l ->> 1)::bigint) AS quantity
              FROM json_to_recordset(orders) AS b (id uuid, lines jsonb)
             CROSS JOIN LATERAL jsonb_array_elements(b.lines) AS l
             WHERE b.id = ANY (inserted)
             GROUP BY 1) taken
     WHERE p.id = taken.product_id;

    RETURN QUERY
    SELECT b.n,
           CASE WHEN own.id IS NOT NULL THEN 'stored'
                WHEN first.request_hash = b.hash THEN 'replayed'
                WHEN first.id IS NOT NULL THEN 'mismatch'
                WHEN supply.missing THEN 'unknown_product'
                WHEN supply.short THEN 'out_of_stock'
                ELSE 'undecided'
           END,
           first.id, first.currency, first.total_cents, first.lines, first.created_at
      FROM json_to_recordset(orders) AS b (n int, principal text, id uuid, key text, hash text, lines jsonb)
      LEFT JOIN orders own ON own.principal = b.principal AND own.id = b.id
      LEFT JOIN orders first ON own.id IS NULL AND first.principal = b.principal AND first.idempotency_key = b.key
      LEFT JOIN LATERAL (SELECT bool_or(p.id IS NULL) AS missing, bool_or(p.stock < (l ->> 1)::bigint) AS short
                           FROM jsonb_array_elements(b.lines) AS l
                           LEFT JOIN products p ON p.id = l ->> 0) supply ON own.id IS NULL AND first.id IS NULL;
END;
$$;
