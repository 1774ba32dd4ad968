-- Products, orders, and the two functions that change both.
--
-- A function's name ends in its version: while a release is rolled out, replicas of the one before call theirs.
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

-- The orders of a batch as rows; n is the order of arrival. Simple enough to be inlined where it is called.
CREATE FUNCTION orders_of_batch_v1(batch jsonb)
RETURNS TABLE (n int, principal text, id uuid, customer_id text, currency text, total_cents bigint, lines jsonb,
               created_at timestamptz, key text, hash text)
LANGUAGE sql STABLE
AS $$
    SELECT o.n::int, o.o ->> 0, (o.o ->> 1)::uuid, o.o ->> 2, o.o ->> 3, (o.o ->> 4)::bigint, o.o -> 5,
           (o.o ->> 6)::timestamptz, o.o ->> 7, o.o ->> 8
      FROM jsonb_array_elements(batch) WITH ORDINALITY AS o (o, n)
$$;

-- Stores a batch in one transaction and tells what became of each order.
--
--   batch:  [[principal, id, customer_id, currency, total_cents, lines, created_at, key, hash], ...] in order of
--           arrival; no (principal, key) twice. Arrays in jsonb: PostgreSQL parses them once, and looks up no names.
--   wanted: {product_id: quantity, ...}, what the whole batch wants.
--
-- Answers with one row whose n is null when every order was stored by this call. Otherwise with a row per order, n
-- counted from 1: verdict stored (by this call, or by an earlier attempt with the same id) | replayed | mismatch |
-- unknown_product | out_of_stock | undecided (stock for this order alone, but not for all that came before it, too:
-- ask again); the columns after it are the order that holds the key, where it is replayed.
--
-- Nearly always there is stock for all, and all are new: that is tried at once, and undone where it fails. Then each
-- order is decided for itself. Locks are taken in one order in every transaction: products by id, then orders by key.
--
-- A function, because the server's connection then keeps its plans (behind PgBouncer, too), and they are made for
-- large tables: sent as text, the same statements cost PostgreSQL six times as much for a lone order.
CREATE FUNCTION store_orders_v1(batch jsonb, wanted jsonb)
RETURNS TABLE (n int, verdict text, id uuid, currency text, total_cents bigint, lines jsonb, created_at timestamptz)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off  -- products are read, and so locked, in the order of their index
SET enable_hashjoin = off SET enable_mergejoin = off  -- small batches, large tables
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    product_ids text[] := ARRAY(SELECT jsonb_object_keys(wanted));
    found_ids   int;
    accepted    int[];   -- the orders there is stock for
    inserted    uuid[];  -- the orders that are new with this transaction
    taken       jsonb;   -- what they want, as in wanted
BEGIN
    BEGIN
        UPDATE products p
           SET stock = p.stock - (wanted -> p.id)::bigint
         WHERE p.id = ANY (product_ids);
        GET DIAGNOSTICS found_ids = ROW_COUNT;
        IF found_ids < cardinality(product_ids) THEN
            RAISE no_data_found;
        END IF;

        -- Without ON CONFLICT, which would look every order up before it is inserted.
        INSERT INTO orders (principal, id, customer_id, status, currency, total_cents, lines, created_at,
                            idempotency_key, request_hash)
        SELECT b.principal, b.id, b.customer_id, 'confirmed', b.currency, b.total_cents, b.lines, b.created_at,
               b.key, b.hash
          FROM orders_of_batch_v1(batch) b
         ORDER BY b.principal, b.key, b.id;

        verdict := 'stored';
        RETURN NEXT;
        RETURN;
    EXCEPTION WHEN no_data_found OR check_violation OR unique_violation THEN
        -- A product is unknown, or its stock too small, or an order has been stored before. All is as it was, no lock
        -- is held.
    END;

    PERFORM FROM products p WHERE p.id = ANY (product_ids) ORDER BY p.id FOR NO KEY UPDATE;

    -- First come, first served: an order is accepted if the stock covers it and all before it. One that could not be
    -- served even alone does not count against those after it.
    WITH line AS MATERIALIZED (
        SELECT b.n, l ->> 0 AS product_id, (l -> 1)::bigint AS quantity,
               (SELECT p.stock FROM products p WHERE p.id = l ->> 0) AS stock
          FROM orders_of_batch_v1(batch) b
         CROSS JOIN LATERAL jsonb_array_elements(b.lines) AS l
    ), request AS (
        SELECT line.*, bool_and(coalesce(stock >= quantity, false)) OVER (PARTITION BY line.n) AS possible
          FROM line
    ), demand AS (
        SELECT request.n, stock, sum(quantity) OVER (PARTITION BY product_id ORDER BY request.n) AS so_far
          FROM request
         WHERE possible
    ), served AS (
        SELECT demand.n FROM demand GROUP BY demand.n HAVING bool_and(so_far <= stock)
    )
    SELECT coalesce(array_agg(served.n), '{}') INTO accepted FROM served;

    WITH stored AS (
        INSERT INTO orders AS o (principal, id, customer_id, status, currency, total_cents, lines, created_at,
                                 idempotency_key, request_hash)
        SELECT b.principal, b.id, b.customer_id, 'confirmed', b.currency, b.total_cents, b.lines, b.created_at,
               b.key, b.hash
          FROM orders_of_batch_v1(batch) b
         WHERE b.n = ANY (accepted)
         ORDER BY b.principal, b.key, b.id
            ON CONFLICT DO NOTHING
        RETURNING o.id
    )
    SELECT coalesce(array_agg(stored.id), '{}') INTO inserted FROM stored;

    SELECT jsonb_object_agg(line.product_id, line.quantity) INTO taken
      FROM (SELECT l ->> 0 AS product_id, sum((l -> 1)::bigint) AS quantity
              FROM orders_of_batch_v1(batch) b
             CROSS JOIN LATERAL jsonb_array_elements(b.lines) AS l
             WHERE b.id = ANY (inserted)
             GROUP BY 1) line;
    UPDATE products p
       SET stock = p.stock - (taken -> p.id)::bigint
     WHERE p.id = ANY (ARRAY(SELECT jsonb_object_keys(taken)));

    -- A snapshot of its own: it sees the winner of a race for a key.
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
      FROM orders_of_batch_v1(batch) b
      -- LIMIT keeps a plan that is made for small tables from reading them whole; and so does the customer: without
      -- it all of a principal's orders may be read by customer.
      LEFT JOIN LATERAL (SELECT o.id
                           FROM orders o
                          WHERE o.principal = b.principal AND o.customer_id = b.customer_id AND o.id = b.id
                          LIMIT 1) own ON true
      LEFT JOIN LATERAL (SELECT o.id, o.request_hash, o.currency, o.total_cents, o.lines, o.created_at
                           FROM orders o
                          WHERE o.principal = b.principal AND o.idempotency_key = b.key AND own.id IS NULL
                          LIMIT 1) first ON true
      LEFT JOIN LATERAL (SELECT bool_or(line.stock IS NULL) AS missing, bool_or(line.stock < line.quantity) AS short
                           FROM (SELECT (l -> 1)::bigint AS quantity,
                                        (SELECT p.stock FROM products p WHERE p.id = l ->> 0) AS stock
                                   FROM jsonb_array_elements(b.lines) AS l) line) supply
             ON own.id IS NULL AND first.id IS NULL;
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
