"""Which files a folder or a pattern stands for: those that git sees, no links, no devices."""

import errno
import glob
import os
import stat
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cli.render import say
from engine.errors import DataError

# In a hook git sets these for the repository that it works on; a folder may lie in another.
OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")

# Messages in English, no index written on the way, nothing fetched from anywhere.
NOTHING_ELSE = {
    "LC_ALL": "C",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "",
}


def unreadable(name: str, error: OSError) -> DataError:
    """Return the error for something that cannot be read."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return DataError(f"{printable(name)}: no such file or folder")
    return DataError(f"{printable(name)}: cannot be read: {error.strerror or error}")


def printable(name: str) -> str:
    """Return a file name on one line, whatever bytes are in it."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def git(
    folder: Path,
    *words: str,
    stdin: bytes = b"",
    anywhere: bool = False,
    without: Sequence[str] = (),
) -> subprocess.CompletedProcess[bytes] | None:
    """Run git in a folder, but no program that its configuration names; None without git.

    With `anywhere` it works on the repository around the folder, whatever a hook has set, and
    whoever owns it. `without` are settings to go without.

    Source: git-config(1), core.fsmonitor, core.hooksPath, safe.directory; git(1), the environment.
    """
    given = {"core.fsmonitor": "false", "core.hooksPath": os.devnull, "core.quotePath": "false"}
    given |= {"safe.directory": "*"} if anywhere else {}
    given |= dict.fromkeys(without, "")
    environment = os.environ | NOTHING_ELSE | {"GIT_CONFIG_COUNT": str(len(given))}
    for number, (key, value) in enumerate(given.items()):
        environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    for name in OF_A_HOOK if anywhere else ():
        environment.pop(name, None)
    command = ["git", "-C", str(folder), *words]
    try:
        return subprocess.run(
            command, input=stdin, capture_output=True, check=False, env=environment
        )
    except OSError:
        return None


@dataclass
class Walk:
    """A search for files; what it left out, by reason, and what it could not read."""

    everything: bool  # hidden and git-ignored files too
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    problems: list[DataError] = field(default_factory=list)

    def folder(self, folder: Path) -> Iterator[Path]:
        """Yield the regular files of a folder, sorted; links are not followed."""
        listed = None if self.everything else self._listed_by_git(folder)
        entries = self._listed_by_us(folder) if listed is None else sorted(listed.items())
        for name, tracked in entries:
            path = folder / name
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if hidden and not tracked and not self.everything:
                self.left_out["hidden"].append(str(path))
            elif os.path.isdir(path) and not os.path.islink(path):
                if os.path.lexists(path / ".git"):  # a repository inside of this one
                    yield from self.folder(path)
            elif self._is_regular(path):
                yield path

    def pattern(self, word: str) -> Iterator[Path]:
        """Yield the regular files that a pattern matches, sorted; `**` follows no links."""
        parts = Path(word).parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base, wild = Path(*parts[:fixed]), [*parts[fixed:], *["*"] * (parts[-1] == "**")]
        found = [path for path in sorted(base.glob("/".join(wild))) if not os.path.isdir(path)]
        asked = self.everything or any(part.startswith(".") for part in wild)
        ignored = set() if self.everything else _ignored(base, found)
        for path in found:
            rest = path.relative_to(base).parts
            if ".git" in rest:
                continue
            if not asked and any(part.startswith(".") for part in rest):
                self.left_out["hidden"].append(str(path))
            elif path in ignored and len(ignored) < len(found):
                self.left_out["git-ignored"].append(str(path))
            elif self._is_regular(path, links=True):
                yield path

    def _is_regular(self, path: Path, links: bool = False) -> bool:
        """Whether a file is one; otherwise what it is has been noted."""
        try:
            mode = path.stat(follow_symlinks=links).st_mode
        except OSError as error:
            if error.errno != errno.ENOENT:  # git knows files that were deleted
                self.problems.append(unreadable(str(path), error))
            return False
        if not stat.S_ISREG(mode):
            reason = "links" if stat.S_ISLNK(mode) else "no regular file"
            self.left_out[reason].append(str(path))
        return stat.S_ISREG(mode)

    def _listed_by_us(self, folder: Path) -> Iterator[tuple[str, bool]]:
        """Yield every file of a folder, and the hidden folders that are not entered."""

        def _refused(error: OSError) -> None:
            self.problems.append(unreadable(str(error.filename), error))

        for parent, folders, files in os.walk(folder, onerror=_refused):
            here = Path(parent)
            if ".git" in {*folders, *files}:
                self.left_out["git's own"].append(str(here / ".git"))
            if ".gitignore" in files and not self.everything:
                say(f"{printable(parent)}: its .gitignore is not honoured, for want of git")
            links = [name for name in folders if os.path.islink(here / name)]
            hidden = [n for n in folders if n.startswith(".") and not self.everything]
            folders[:] = sorted(set(folders) - {*hidden, *links, ".git"})
            for name in sorted({*files, *hidden, *links} - {".git"}):
                yield str((here / name).relative_to(folder)), False

    def _listed_by_git(self, folder: Path) -> dict[str, bool] | None:
        """Return what git does not ignore, and whether it is tracked; None if git is of no help.

        Outside of a repository, and in a folder that its repository ignores but somebody asks for
        by name, an empty repository serves to apply the rules that lie in the folder.
        """
        words = ("ls-files", "-z", "-t", "--others", "--exclude-standard")
        process = git(folder, *words, "--cached", anywhere=True)
        if process is None:
            return None
        ignored = None
        if not process.stdout:
            ignored = git(folder, "check-ignore", "-q", ".", anywhere=True)
        if process.returncode or (ignored and not ignored.returncode):
            with tempfile.TemporaryDirectory() as empty:
                git(Path(empty), "init", "-q", "--template=", anywhere=True)
                where = (f"--git-dir={empty}/.git", "--work-tree=.")
                process = git(folder, *where, *words, anywhere=True)
        if process is None or process.returncode:
            return None
        for line in process.stderr.decode("utf-8", "replace").splitlines():
            if line.startswith("warning: could not open"):  # and the others are listed
                reason = line.rpartition(": ")[2]
                self.problems.append(
                    DataError(f"{folder}: a folder in it cannot be read: {reason}")
                )
        entries = [os.fsdecode(entry) for entry in process.stdout.split(b"\0") if entry]
        return {entry[2:]: entry[0] != "?" for entry in entries}


def _ignored(base: Path, files: list[Path]) -> set[Path]:
    """Return those files that git ignores; none outside of a repository."""
    names = b"\0".join(os.fsencode(file.relative_to(base)) for file in files)
    process = git(base, "check-ignore", "-z", "--stdin", stdin=names + b"\0", anywhere=True)
    found = process.stdout.split(b"\0") if process else []
    return {base / os.fsdecode(name) for name in found if name}
