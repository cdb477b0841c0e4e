"""Pages about entities, from files, a dump or an encyclopaedia's interface, and the passages in them that name one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gapprobe.errors import ConfigError, DataError
from gapprobe.files import write_json
from gapprobe.tasks.questions import Entity, mentions

SENTENCES = 2  # of a passage, as published
AT_ONCE = 1024  # pages of a dump held in memory
LONGEST = 800  # characters of a passage; a longer one is no prose
_SUFFIXES = (".txt", ".md")
# The ends of sentences, but not behind initials and titles.
_ENDS = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:St|Mr|Dr|Mt)\.)(?<!\bMrs\.)[\"”’')\]]*\s+(?=[\"“‘'(\[]*[A-Z0-9])")
_HEADING = 60  # characters; a shorter line without an end of a sentence, at the head of a paragraph, is no sentence
_AGENT = "gapprobe (https://pypi.org/project/gapprobe)"


@runtime_checkable
class Pages(Protocol):
    """Where pages come from."""

    def read(self, entities: Sequence[Entity]) -> Iterator[tuple[Entity, str, str]]:
        """Yield every entity with its page, "" if there is none, and what went wrong, "" if nothing did."""
        ...


def open_pages(source: str, folder: Path) -> Pages:
    """Return pages by what a user calls their source.

    Args:
        source: a folder with a `.txt` or `.md` file an entity; a dump, `.jsonl` or `.parquet` with the columns `title`
            and `text`; or the address of a MediaWiki's api.php.
        folder: keeps what an interface gave.

    Raises:
        ConfigError: it is none of these.
    """
    if re.match(r"https?://", source):
        return WikiPages(source, folder)
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderPages(path)
    if path.is_file() and path.suffix in (".jsonl", ".parquet"):
        return DumpPages(path)
    raise ConfigError(
        f"pages {source} must be a folder of .txt or .md files, a .jsonl or .parquet with the columns title and text, "
        "or the address of a MediaWiki's api.php"
    )


class FolderPages:
    """A file an entity, called as the entity or one of its aliases, with spaces or underscores."""

    def __init__(self, folder: Path) -> None:
        self._files = {_title(path.stem): path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES}

    def read(self, entities: Sequence[Entity]) -> Iterator[tuple[Entity, str, str]]:
        """Yield every entity with its page; see `Pages.read`."""
        for entity in entities:
            path = next((self._files[_title(n)] for n in entity.names if _title(n) in self._files), None)
            try:
                yield entity, "" if path is None else path.read_text(encoding="utf-8"), ""
            except (OSError, UnicodeDecodeError) as error:
                yield entity, "", f"page {path} cannot be read: {error}"


class DumpPages:
    """A dump with a line or row a page; it is read through once, and pages that nobody wants are not held."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, entities: Sequence[Entity]) -> Iterator[tuple[Entity, str, str]]:
        """Yield every entity with its page; see `Pages.read`."""
        wanted = {_title(name) for entity in entities for name in entity.names}
        found: dict[str, str] = {}
        for title, text in self._rows():
            if _title(title) in wanted:
                found.setdefault(_title(title), text)
        for entity in entities:
            yield entity, next((found[_title(n)] for n in entity.names if _title(n) in found), ""), ""

    def _rows(self) -> Iterator[tuple[str, str]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self._path.suffix == ".jsonl":
                with self._path.open(encoding="utf-8") as file:
                    for line in filter(str.strip, file):
                        row = json.loads(line)
                        yield str(row["title"]), str(row["text"])
            else:
                # No threads: one that still starts when the process ends aborts it (see `store.table`).
                file = pq.ParquetFile(self._path)
                for batch in file.iter_batches(AT_ONCE, columns=["title", "text"], use_threads=False):
                    for row in batch.to_pylist():
                        yield str(row["title"]), str(row["text"])
        except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError, TypeError, ValueError, OSError) as error:
            raise ConfigError(f"dump {self._path} needs the columns title and text: {error}") from error


class WikiPages:
    """Pages through a MediaWiki's interface (action=query, prop=extracts); what came is kept and not asked again."""

    def __init__(self, address: str, folder: Path) -> None:
        self._address, self._folder = address, folder

    def read(self, entities: Sequence[Entity]) -> Iterator[tuple[Entity, str, str]]:
        """Yield every entity with its page; see `Pages.read`."""
        for entity in entities:
            text = problem = ""
            try:
                pages = (self._page(name.replace("_", " ")) for name in entity.names)
                text = next(filter(None, pages), "")
            except DataError as error:
                problem = str(error)
            yield entity, text, problem

    def _page(self, title: str) -> str:
        import httpx

        key = hashlib.sha256(f"{self._address}\0{title}".encode()).hexdigest()[:32]
        path = self._folder / f"{key}.json"
        if path.exists():
            try:
                return str(json.loads(path.read_text(encoding="utf-8"))["text"])
            except (ValueError, KeyError, TypeError, OSError):
                pass  # it is asked for again
        query = {"action": "query", "prop": "extracts", "explaintext": "1", "redirects": "1", "titles": title}
        query |= {"format": "json", "formatversion": "2"}
        try:
            transport = httpx.HTTPTransport(retries=3)
            with httpx.Client(transport=transport, timeout=60, headers={"user-agent": _AGENT}) as client:
                told: Any = client.get(self._address, params=query).raise_for_status().json()
            page = told["query"]["pages"][0]
            text = str(page.get("extract") or "")
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataError(f"page {title!r} cannot be had from {self._address}: {error}") from error
        write_json(path, {"title": title, "text": text})
        return text


def passages(page: str, entity: Entity, most: int) -> list[str]:
    """Return the first passages of a page that name an entity: two sentences each, none of them in two passages."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[=#])|(?<=[=#])\n", page):
        first, _, rest = paragraph.strip().partition("\n")
        if len(first) < _HEADING and not first.rstrip("\"”’')]").endswith((".", "!", "?", ",")):
            paragraph = rest
        sentences = [" ".join(s.split()) for s in _ENDS.split(paragraph) if s.strip()]
        i = 0
        while i < len(sentences) and len(found) < most:
            passage = " ".join(sentences[i : i + SENTENCES])
            if any(mentions(sentences[i], name) for name in entity.names) and len(passage) <= LONGEST:
                found.append(passage)
                i += SENTENCES
            else:
                i += 1
    return found


def _title(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()
