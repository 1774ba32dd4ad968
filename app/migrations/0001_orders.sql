-- Products, orders, and the functions that change them.
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
    -- When a worker may next ask payments about it. The row is the outbox: a worker takes an order by moving this to
    -- the end of its lease. 'infinity': all has been asked; null: it was confirmed when it was stored.
    payment_due     timestamptz,
    PRIMARY KEY (principal, id)
);

CREATE UNIQUE INDEX orders_idempotency_key ON orders (principal, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX orders_by_customer ON orders (principal, customer_id, id);
CREATE INDEX orders_not_confirmed ON orders (principal, status, id) WHERE status <> 'confirmed';
CREATE INDEX orders_payment_due ON orders (payment_due) WHERE payment_due < 'infinity';

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
--   one_by_one: decide each order for itself at once; for orders that are likely to fail a common attempt.
--   pays: the orders are stored as pending, and payments is to be asked; otherwise they are confirmed.
--
-- Answers with one row whose n is null when every order was stored by this call. Otherwise with a row per order, n
-- counted from 1, and its verdict:
--   stored          by this call, or by an earlier attempt with the same id
--   replayed        the columns behind the verdict are the order that holds the key
--   replayed_pending   so, and the first answer called it pending
--   mismatch        another order holds the key
--   unknown_product, out_of_stock, locked: lines holds the ids of the products that are unknown, short, or held by
--                   another transaction for longer than the function waits
--   undecided       it gave way to an order that turned out to be stored already: ask again, once
--
-- Nearly always there is stock for all, and all are new: that is tried at once, and undone where it fails. Then each
-- order is decided for itself, first come, first served. Locks are taken in one order in every transaction: products
-- by id, then orders by key. A lock that does not come soon is not waited for: the orders that need it are left out.
--
-- A function, because the server's connection then keeps its plans (behind PgBouncer, too), and they are made for
-- large tables: sent as text, the same statements cost PostgreSQL six times as much for a lone order.
CREATE FUNCTION store_orders_v1(batch jsonb, wanted jsonb, one_by_one boolean, pays boolean DEFAULT false)
RETURNS TABLE (n int, verdict text, id uuid, currency text, total_cents bigint, lines jsonb, created_at timestamptz)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off  -- products are read, and so locked, in the order of their index
SET enable_hashjoin = off SET enable_mergejoin = off  -- small batches, large tables
SET plan_cache_mode = force_generic_plan
SET jit = off  -- on by default up to PostgreSQL 18: compiling takes longer than a hundred batches
SET lock_timeout = '150ms'  -- longer than a commit takes, and short to whoever waits behind this batch
AS $$
#variable_conflict use_column
DECLARE
    new_status  text := CASE WHEN pays THEN 'pending' ELSE 'confirmed' END;
    first_due   timestamptz := CASE WHEN pays THEN now() END;
    product_ids text[] := ARRAY(SELECT jsonb_object_keys(wanted));
    found_ids   int;
    is_locked   boolean := false;  -- a lock did not come in time
    places      jsonb;     -- by product id: its place in stock, counted from 1; 0: another transaction holds it
    supply      bigint[];  -- of each product that is held
    stock       bigint[];  -- what is left of it
    request     record;
    place       int;
    unknown     text[];
    short       text[];
    locked      text[];
    behind      text[];    -- enough of it alone, but not behind the orders before it
    accepted    int[] := '{}';  -- the orders there is stock for
    verdicts    text[] := '{}';  -- of the others, by n
    products    jsonb[] := '{}';  -- that led to it
    inserted    uuid[];  -- the orders that are new with this transaction
    taken       jsonb;   -- what they want, as in wanted
BEGIN
    IF NOT one_by_one THEN
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
                                idempotency_key, request_hash, payment_due)
            SELECT b.principal, b.id, b.customer_id, new_status, b.currency, b.total_cents, b.lines, b.created_at,
                   b.key, b.hash, first_due
              FROM orders_of_batch_v1(batch) b
             ORDER BY b.principal, b.key, b.id;

            verdict := 'stored';
            RETURN NEXT;
            RETURN;
        EXCEPTION
            WHEN no_data_found OR check_violation OR unique_violation THEN
                -- A product is unknown, or its stock too small, or an order has been stored before. All is as it was,
                -- no lock is held.
            WHEN lock_not_available THEN
                is_locked := true;
        END;
    END IF;

    IF NOT is_locked THEN
        BEGIN
            PERFORM FROM products p WHERE p.id = ANY (product_ids) ORDER BY p.id FOR NO KEY UPDATE;
        EXCEPTION WHEN lock_not_available THEN
            is_locked := true;
        END;
    END IF;
    IF is_locked THEN
        SELECT jsonb_object_agg(p.id, 0) INTO places FROM products p WHERE p.id = ANY (product_ids);
    END IF;
    SELECT coalesce(places, '{}') || coalesce(jsonb_object_agg(held.id, held.place), '{}'),
           array_agg(held.stock ORDER BY held.place)
      INTO places, supply
      FROM (SELECT mine.id, mine.stock, row_number() OVER () AS place
              FROM (SELECT p.id, p.stock
                      FROM products p
                     WHERE p.id = ANY (product_ids)
                     ORDER BY p.id
                       FOR NO KEY UPDATE SKIP LOCKED) mine) held;

    stock := supply;
    FOR request IN
        SELECT b.n, array_agg(l ->> 0) AS ids, array_agg((places -> (l ->> 0))::int) AS places,
               array_agg((l -> 1)::bigint) AS quantities
          FROM orders_of_batch_v1(batch) b
         CROSS JOIN LATERAL jsonb_array_elements(b.lines) AS l
         GROUP BY b.n
         ORDER BY b.n
    LOOP
        unknown := '{}';
        short := '{}';
        locked := '{}';
        behind := '{}';
        FOR line IN 1 .. cardinality(request.ids) LOOP
            place := request.places[line];
            IF place IS NULL THEN
                unknown := unknown || request.ids[line];
            ELSIF place = 0 THEN
                locked := locked || request.ids[line];
            ELSIF supply[place] < request.quantities[line] THEN
                short := short || request.ids[line];
            ELSIF stock[place] < request.quantities[line] THEN
                behind := behind || request.ids[line];
            END IF;
        END LOOP;
        IF unknown <> '{}' THEN
            verdicts[request.n] := 'unknown_product';
            products[request.n] := to_jsonb(unknown);
        ELSIF short <> '{}' THEN
            verdicts[request.n] := 'out_of_stock';
            products[request.n] := to_jsonb(short);
        ELSIF locked <> '{}' THEN
            verdicts[request.n] := 'locked';
            products[request.n] := to_jsonb(locked);
        ELSIF behind <> '{}' THEN
            verdicts[request.n] := 'behind';
            products[request.n] := to_jsonb(behind);
        ELSE
            accepted := accepted || request.n;
            FOR line IN 1 .. cardinality(request.ids) LOOP
                place := request.places[line];
                stock[place] := stock[place] - request.quantities[line];
            END LOOP;
        END IF;
    END LOOP;

    WITH stored AS (
        INSERT INTO orders AS o (principal, id, customer_id, status, currency, total_cents, lines, created_at,
                                 idempotency_key, request_hash, payment_due)
        SELECT b.principal, b.id, b.customer_id, new_status, b.currency, b.total_cents, b.lines, b.created_at,
               b.key, b.hash, first_due
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
                WHEN first.request_hash = b.hash
                THEN CASE WHEN first.payment_due IS NULL THEN 'replayed' ELSE 'replayed_pending' END
                WHEN first.id IS NOT NULL THEN 'mismatch'
                -- What an order that is not new did not take may be enough for one behind it.
                WHEN verdicts[b.n] = 'behind' AND cardinality(inserted) = cardinality(accepted) THEN 'out_of_stock'
                WHEN verdicts[b.n] <> 'behind' THEN verdicts[b.n]
                ELSE 'undecided'
           END,
           first.id, first.currency, first.total_cents,
           CASE WHEN own.id IS NULL THEN coalesce(first.lines, products[b.n]) END, first.created_at
      FROM orders_of_batch_v1(batch) b
      -- LIMIT keeps a plan that is made for small tables from reading them whole; and so does the customer: without
      -- it all of a principal's orders may be read by customer.
      LEFT JOIN LATERAL (SELECT o.id
                           FROM orders o
                          WHERE o.principal = b.principal AND o.customer_id = b.customer_id AND o.id = b.id
                          LIMIT 1) own ON true
      LEFT JOIN LATERAL (SELECT o.id, o.request_hash, o.currency, o.total_cents, o.lines, o.created_at,
                                o.payment_due
                           FROM orders o
                          WHERE o.principal = b.principal AND o.idempotency_key = b.key AND own.id IS NULL
                          LIMIT 1) first ON true;
END;
$$;

-- Cancels an order whose status is one of *cancellable* and gives its stock back; answers with the order as it then
-- is (no row: there is no such order). Repeatable: a second call changes nothing.
--
-- Of an order that payments may have authorised a void is owed. Where a worker is asking at this moment the void is due
-- when its lease ends, so that it comes after whatever that worker still sends.
CREATE FUNCTION cancel_order_v1(a_principal text, a_id uuid, cancellable text[])
RETURNS TABLE (id uuid, customer_id text, status text, currency text, total_cents bigint, lines jsonb,
               created_at timestamptz)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET jit = off
SET lock_timeout = '150ms'  -- as above
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
       SET status = 'cancelled',
           payment_due = CASE WHEN payment_due = 'infinity' THEN now() ELSE payment_due END
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

-- A page of a principal's orders, newest first: at most a_limit of those older than a_before.
--
--   a_customer, a_status, a_before: null for any.
--
-- A function, because its plans are kept and go by an index whatever the statistics say: sorting what a customer has
-- ordered so far took a fresh table forty times as long.
CREATE FUNCTION list_orders_v1(a_principal text, a_customer text, a_status text, a_before uuid, a_limit int)
RETURNS TABLE (id uuid, customer_id text, status text, currency text, total_cents bigint, lines jsonb,
               created_at timestamptz)
LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
SET plan_cache_mode = force_generic_plan
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    before uuid := coalesce(a_before, 'ffffffff-ffff-ffff-ffff-ffffffffffff');
BEGIN
    IF a_customer IS NOT NULL THEN
        RETURN QUERY
        SELECT o.id, o.customer_id, o.status, o.currency, o.total_cents, o.lines, o.created_at
          FROM orders o
         WHERE o.principal = a_principal AND o.customer_id = a_customer AND o.id < before
           AND (a_status IS NULL OR o.status = a_status)
         ORDER BY o.id DESC
         LIMIT a_limit;
    ELSIF a_status <> 'confirmed' THEN
        RETURN QUERY
        SELECT o.id, o.customer_id, o.status, o.currency, o.total_cents, o.lines, o.created_at
          FROM orders o
         WHERE o.principal = a_principal AND o.status = a_status AND o.id < before
           AND o.status <> 'confirmed'  -- lets the partial index serve it
         ORDER BY o.id DESC
         LIMIT a_limit;
    ELSE
        RETURN QUERY
        SELECT o.id, o.customer_id, o.status, o.currency, o.total_cents, o.lines, o.created_at
          FROM orders o
         WHERE o.principal = a_principal AND o.id < before
           AND (a_status IS NULL OR o.status = a_status)
         ORDER BY o.id DESC
         LIMIT a_limit;
    END IF;
END;
$$;

-- Takes at most *places* orders about which payments is to be asked, those that have been due longest first, for
-- *lease* by the database's clock: a worker that dies keeps them no longer.
CREATE FUNCTION claim_payments_v1(places int, lease interval)
RETURNS TABLE (principal text, id uuid, status text, currency text, total_cents bigint)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    UPDATE orders o
       SET payment_due = now() + lease
      FROM (SELECT d.principal, d.id
              FROM orders d
             WHERE d.payment_due < 'infinity' AND d.payment_due <= now()
             ORDER BY d.payment_due
             LIMIT places
               FOR NO KEY UPDATE SKIP LOCKED) due
     WHERE o.principal = due.principal AND o.id = due.id
    RETURNING o.principal, o.id, o.status, o.currency, o.total_cents;
END;
$$;

-- Books what payments said of orders: [[principal, id, verdict, seconds], ...], the verdict one of
--   authorised, declined   a pending order becomes confirmed or declined; a declined one gives its stock back
--   voided                 of a cancelled order: nothing more is owed
--   later                  no definite answer: ask again in so many seconds
-- An order that was cancelled while payments was asked for its authorisation is to be voided, at once. Repeatable.
CREATE FUNCTION book_payments_v1(results jsonb)
RETURNS void
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET jit = off
SET lock_timeout = '1s'  -- nobody waits for this: the orders are stored
AS $$
#variable_conflict use_column
BEGIN
    -- Products first, as everywhere.
    PERFORM FROM products p
      WHERE p.id IN (SELECT l ->> 0
                       FROM jsonb_array_elements(results) AS r
                       JOIN orders o ON o.principal = r ->> 0 AND o.id = (r ->> 1)::uuid
                      CROSS JOIN LATERAL jsonb_array_elements(o.lines) AS l
                      WHERE r ->> 2 = 'declined' AND o.status = 'pending')
      ORDER BY p.id
        FOR NO KEY UPDATE;
    PERFORM FROM jsonb_array_elements(results) AS r
       JOIN orders o ON o.principal = r ->> 0 AND o.id = (r ->> 1)::uuid
      ORDER BY o.principal, o.id
        FOR NO KEY UPDATE OF o;

    WITH moved AS (
        UPDATE orders o
           SET status = CASE WHEN o.status <> 'pending' THEN o.status
                             WHEN r ->> 2 = 'authorised' THEN 'confirmed'
                             WHEN r ->> 2 = 'declined' THEN 'declined'
                             ELSE o.status END,
               payment_due = CASE WHEN r ->> 2 = 'later' THEN now() + (r ->> 3)::float8 * interval '1 s'
                                  WHEN (o.status = 'cancelled') = (r ->> 2 = 'voided') THEN 'infinity'
                                  ELSE now() END
          FROM jsonb_array_elements(results) AS r
         WHERE o.principal = r ->> 0 AND o.id = (r ->> 1)::uuid AND o.payment_due < 'infinity'
        RETURNING o.status, o.lines
    )
    UPDATE products p
       SET stock = p.stock + back.quantity
      FROM (SELECT l ->> 0 AS product_id, sum((l ->> 1)::bigint) AS quantity
              FROM moved CROSS JOIN LATERAL jsonb_array_elements(moved.lines) AS l
             WHERE moved.status = 'declined'
             GROUP BY 1) back
     WHERE p.id = back.product_id;
END;
$$;
