"""Accounts and user namespaces that may run the server, since PostgreSQL refuses to run as root.

As root it runs as the account the directory already belongs to; else in a user namespace, where root's files stay
readable and nothing on the host changes; else (a container that forbids user namespaces) as `postgres` or `nobody`,
and then the directory belongs to that account.
"""

import os
import pwd
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.embedded_postgres.binaries import reason, server_environment
from app.embedded_postgres.refusals import WAY_OUT, EmbeddedPostgresError


@dataclass(frozen=True)
class Account:
    """One way to run the server: the command prefix that becomes it, and its ids as the host sees them."""

    prefix: tuple[str, ...]
    uid: int
    gid: int

    def run(self, command: Sequence[str], cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run *command* to its end as this account, with *text* on its stdin."""
        return subprocess.run(  # noqa: S603 -- our own arguments
            [*self.prefix, *command],
            cwd=cwd,
            env=server_environment(),
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )

    def own(self, path: Path) -> None:
        """Give *path* to this account, where we are root."""
        if os.geteuid() == 0:
            os.lchown(path, self.uid, self.gid)


def own_account() -> Account:
    """The account of this process."""
    return Account((), os.geteuid(), os.getegid())


def choose_account(directory: Path, postgres: Path) -> tuple[Account, str]:
    """The first account that can run *postgres* at *directory*, and the binaries' major version."""
    why = ""
    for account in _accounts(directory):
        command = ["sh", "-c", 'cd "$1" && "$2" --version', "sh", str(directory.parent), str(postgres)]
        try:
            probe = account.run(command, cwd=Path("/"))
        except OSError as exc:  # no unshare or no setpriv
            why = str(exc)
            continue
        if probe.returncode == 0 and (version := re.search(r"\(PostgreSQL\) (\d+)", probe.stdout)):
            return account, version[1]
        why = reason(probe.stderr)
    if os.geteuid() == 0:
        raise EmbeddedPostgresError(
            "PostgreSQL refuses to run as root, and neither a user namespace nor the accounts postgres and "
            f"nobody can run {postgres} in {directory}: {WAY_OUT}, or run as an ordinary user"
        )
    raise EmbeddedPostgresError(f"{postgres} cannot run in {directory} ({why}): {WAY_OUT}")


def _accounts(directory: Path) -> Iterator[Account]:
    # A change of credentials clears PR_SET_PDEATHSIG, so it is set last. SIGINT asks for a fast shutdown.
    end_with_us = ("setpriv", "--pdeathsig", "INT", "--")
    own = own_account()
    if own.uid != 0:
        yield Account(end_with_us, own.uid, own.gid)
        yield own  # macOS: what a killed owner leaves is stopped by the next start
        return
    ordinary = [entry for entry in pwd.getpwall() if entry.pw_uid != 0]  # initdb wants an account with a name
    named = [entry for name in ("postgres", "nobody") for entry in ordinary if entry.pw_name == name]
    folders = (directory, *directory.parents)
    owners = [entry for folder in folders for entry in ordinary if entry.pw_uid == folder.stat().st_uid]
    if owners and owners[0].pw_uid == directory.stat().st_uid:
        yield _unprivileged(owners[0])
    for entry in (named or ordinary)[-1:]:
        mapped = (f"--map-user={entry.pw_uid}", f"--map-group={entry.pw_gid}")
        yield Account(("unshare", "--user", *mapped, "--", *end_with_us), own.uid, own.gid)
    for entry in (*named, *owners[:1]):
        yield _unprivileged(entry)


def _unprivileged(entry: pwd.struct_passwd) -> Account:
    ids = (f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups")
    return Account(("setpriv", *ids, "--pdeathsig", "INT", "--"), entry.pw_uid, entry.pw_gid)
