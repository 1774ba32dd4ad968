-- Products, orders, and the two functions that change both.
--
-- An order is one row: its lines are read and written only as a whole, so they live in it (the view order_lines
-- shows them as rows). Every look-up is by principal first, so the primary key is too.

CREATE TABLE products (
    id          text   PRIMARY KEY,
    name        text   NOT NULL,
    price_cents bigint NOT NULL CHECK (price_cents >= 0),
    currency    text   NOT NULL,
    stock       bigint NOT NULL CONSTRAINT stock_not_negative CHECK (stock >= 0)
) WITH (fillfactor = 50);  -- room for the next version of a row on its own page: stock changes with every batch

CREATE TABLE orders (
    principal       text        NOT NULL,
    id              uuid        NOT NULL,
    customer_id     text        NOT NULL,
    status          text        NOT NULL CHECK (status IN ('pending', 'confirmed', 'declined', 'cancelled')),
    currency        text        NOT NULL,
    total_cents     bigint      NOT NULL CHECK (total_cents >= 0),
    lines           jsonb       NOT NULL CHECK (jsonb_array_length(lines) > 0),  -- [[product_id, quantity, unit_price_cents], ...]
    created_at      timestamptz NOT NULL,
    idempotency_key text,                  -- null: the order's own id serves as the key
    request_hash    text        NOT NULL,  -- SHA-256 of the parsed order, hex
    PRIMARY KEY (principal, id)
);

CREATE UNIQUE INDEX orders_idempotency_key ON orders (principal, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX orders_by_customer ON orders (principal, customer_id, id);
CREATE INDEX orders_not_confirmed ON orders (principal, status, id) WHERE status <> 'confirmed';

CREATE VIEW order_lines AS
SELECT o.principal, o.id AS order_id, l.position, l.line ->> 0 AS product_id,
       (l.line ->> 1)::bigint AS quantity, (l.line ->> 2)::bigint AS unit_price_cents
  FROM orders o, jsonb_array_elements(o.lines) WITH ORDINALITY AS l (line, position);

-- Stores a batch in one transaction and tells what became of each order.
--
--   orders: [{"n": 0, "principal", "id", "customer_id", "currency", "total_cents", "lines", "created_at", "key",
--           "hash"}, ...]; n is the order of arrival; no (principal, key) twice.
--   product_ids, quantities: what the whole batch wants, summed by product.
--
-- verdict: stored (by this call, or by an earlier attempt with the same id) | replayed | mismatch | unknown_product |
-- out_of_stock | undecided (stock for this order alone, but not for all that came before it, too: ask again). The
-- columns after it are the order that holds the key, where it is replayed.
--
-- A function, because the server's connection then keeps its plans (behind PgBouncer, too), and they are made for large
-- tables: sent as text, the same statements cost Postgres six times as much for a lone order (1.5 ms against 0.24).
-- Each of its statements has a fresh snapshot, so the last one sees the winner of a race for a
-- key. Locks are taken in one order in every transaction: products by id, then orders by key.
CREATE FUNCTION store_orders_v1(orders json, product_ids text[], quantities bigint[])
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

-- Cancels an order whose status is one of *cancellable* and gives its stock back; answers with the order as it then
-- is (no row: there is no such order). Repeatable: a second call changes nothing.
CREATE FUNCTION cancel_order_v1(a_principal text, a_id uuid, cancellable text[])
RETURNS TABLE (id uuid, customer_id text, status text, currency text, total_cents bigint, lines jsonb,
               created_at timestamptz)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    -- An order's lines never change, so they may be read before anything is locked: products come first.
    PERFORM 1
       FROM products p
      WHERE p.id IN (SELECT l ->> 0
                       FROM orders o, jsonb_array_elements(o.lines) AS l
                      WHERE o.principal = a_principal AND o.id = a_id)
      ORDER BY p.id
        FOR NO KEY UPDATE;

    UPDATE orders o
       SET status = 'cancelled'
     WHERE o.principal = a_principal AND o.id = a_id AND o.status = ANY (cancellable);
    IF FOUND THEN
        UPDATE products p
           SET stock = p.stock + (l ->> 1)::bigint
          FROM orders o, jsonb_array_elements(o.lines) AS l
         WHERE o.principal = a_principal AND o.id = a_id AND p.id = l ->> 0;
    END IF;

    RETURN QUERY
    SELECT o.id, o.customer_id, o.status, o.currency, o.total_cents, o.lines, o.created_at
      FROM orders o
     WHERE o.principal = a_principal AND o.id = a_id;
END;
$$;
