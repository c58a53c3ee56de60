"""Rows of data from a folder or from the hub, by the place that an error names; checks, labels and samples.

    rows = read_file(Path("demo/data"), "train.en")             # {"demo/data/train.en.jsonl:1": {…}, …}
    rows = read_hub("facebook/xnli/de/test")                    # owner/name/config/split
    rows = check_rows(rows, ["premise", "hypothesis", "label"], set(), {"label": (0, 1, 2)})  # a list

What cannot be read or used ends in a UserError: one line that names the place and the remedy.
"""

import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE  # as the user set it
from huggingface_hub.utils import get_session


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit status 2."""


@contextlib.contextmanager
def blame(what: str, remedy: str):
    """Whatever goes wrong inside, but for want of memory, is one line for the user: what (error): remedy."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}): {remedy}") from None


# ------------------------------------------------------------------------------------------------------------
# A folder
# ------------------------------------------------------------------------------------------------------------


WANTED = ("train.en.jsonl, validation.en.jsonl and test.<language>.jsonl (a JSON object a line), or the same "
          "as .csv or .tsv with a header line")


def languages_in(folder: Path) -> list[str]:
    """Those that a data folder has test data of."""
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}: --data must name one with {WANTED}")
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    found = {name.split(".")[1] for name in files if re.fullmatch(r"test\.[^.]+\.(jsonl|csv|tsv)", name)}
    if not found:
        listed = ", ".join(files[:5]) + ", …" * (len(files) > 5)
        raise UserError(f"{folder} has {listed or 'no files'} and no test data: --data needs {WANTED}")
    return sorted(found)


def read_file(folder: Path, name: str) -> dict[str, dict]:
    """The rows of the one file of that name, in any of the three formats."""
    paths = [path for ending in ("jsonl", "csv", "tsv") if (path := folder / f"{name}.{ending}").is_file()]
    if not paths:
        raise UserError(f"missing data file {folder / name}.jsonl: --data must hold {WANTED}")
    if len(paths) > 1:
        raise UserError(f"{paths[0]} and {paths[1].name}: only one of them can be meant; move the other away")
    rows = read_lines(paths[0]) if paths[0].suffix == ".jsonl" else read_table(paths[0])
    if not rows:
        raise UserError(f"{paths[0]} is empty: it needs a row an example")
    return rows


def read_utf8(path: Path, errors: str = "strict") -> str:
    """The text of a file, without a byte-order mark."""
    content = path.read_bytes()
    with blame(f"{path} is not text in UTF-8 but, it seems, in UTF-16 or Latin-1", "save it as UTF-8"):
        text = content.decode("utf-8-sig", errors)
        if "\0" in text[:1000]:
            raise UnicodeError
        return text


def read_lines(path: Path) -> dict[str, dict]:
    """A JSON object a line."""
    text = read_utf8(path, errors="surrogateescape")
    if text.lstrip()[:1] == "[":
        raise UserError(f"{path} is a JSON array: write one JSON object a line (jq -c '.[]' does)")
    rows = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object in UTF-8; each line must be one")
            rows[f"{path}:{number}"] = row
    return rows


QUOTES = "a field with quotation marks must stand in quotes, with its own doubled"


def read_table(path: Path) -> dict[str, dict]:
    """CSV or TSV by Python's csv: quoted fields may hold line breaks. A label of digits is an integer."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(f"{path}:{reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; {QUOTES}") from None
    rows, header = {}, lines[0][1] if lines else []
    for place, cells in lines[1:]:
        if len(cells) != len({*header}):
            raise UserError(f"{place}: {len(cells)} fields, and {len({*header})} names in the header")
        if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
            raise UserError(f"{place}: a quotation mark opens a field of several rows; {QUOTES}")
        row = rows[place] = dict(zip(header, (cell or None for cell in cells)))
        if re.fullmatch(r"0|-?[1-9]\d{0,17}", row.get("label") or ""):
            row["label"] = int(row["label"])
    return rows


# ------------------------------------------------------------------------------------------------------------
# The hub
# ------------------------------------------------------------------------------------------------------------


WITHOUT_HUB = ("check the connection; without one, folders serve (python extras/demo.py makes two: --model "
               "demo/model --data demo/data)")


def reach_hub(settings) -> None:
    """Use the hub's cache alone if the hub does not answer: its client would retry for minutes."""
    constants.HF_HUB_OFFLINE = HF_HUB_OFFLINE
    if HF_HUB_OFFLINE or settings.data is not None and Path(settings.model).is_dir():
        return
    seconds = get_session().timeout = constants.HF_HUB_ETAG_TIMEOUT  # some calls of it have no limit
    try:  # in a thread: a search for the hub's address knows no limit of time
        answer = ThreadPoolExecutor(1).submit(get_session().head, constants.ENDPOINT, timeout=seconds)
        constants.HF_HUB_OFFLINE = answer.result(1.2 * seconds).status_code >= 500
    except Exception:  # the client raises its HTTP library's errors
        constants.HF_HUB_OFFLINE = True
    if constants.HF_HUB_OFFLINE:
        print(f"note: {constants.ENDPOINT} does not answer; what it gave before is read from the local cache")


def read_hub(place: str) -> dict[str, dict]:
    """The rows of owner/name/config/split, from the hub's own parquet conversion, which runs no script.

    Downloads are kept in the hub's cache, so HF_HUB_OFFLINE=1 works after the first time.
    """
    import datasets

    owner, name, config, split = place.split("/")
    with blame(f"data {place} is not in the local cache and the hub does not give it", WITHOUT_HUB):
        folder = snapshot_download(f"{owner}/{name}", allow_patterns=f"{config}/{split}/*.parquet",
                                   repo_type="dataset", revision="refs/convert/parquet")
    files = sorted(Path(folder, config, split).glob("*.parquet"))
    if not files:
        source = "local cache" if constants.HF_HUB_OFFLINE else "hub"
        raise UserError(f"the {source} has no parquet files for {place}: name a folder with --data")
    rows = {}
    for file in files:
        with blame(f"{file.resolve()} holds no readable data", "delete it; the next run downloads it again"):
            # streamed, so that no second copy of the data is cached
            data = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
            rows |= {f"{place}/{file.name}, row {number}": row for number, row in enumerate(data)}
    return rows


# ------------------------------------------------------------------------------------------------------------
# Checks, labels and samples
# ------------------------------------------------------------------------------------------------------------


def check_rows(rows: dict[str, dict], columns: list[str], absent: set[str], values: dict,
               target: str = "label", is_by_word: bool = False) -> list[dict]:
    """These columns of every row, which has none of `absent`; an error names the row's place."""
    checked = []
    for place, row in rows.items():
        try:
            checked.append(check_row(row, columns, absent, values, target, is_by_word))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
    return checked


def check_row(row: dict, columns: list[str], absent: set[str], values: dict, target: str,
              is_by_word: bool) -> dict:
    """These columns of one row; ValueError says what is wrong with it."""
    for column in columns:
        if row.get(column) is None:
            raise ValueError(f"no column {column!r}; every row of every file needs {', '.join(columns)}")
    for column in absent:
        if row.get(column) is not None:
            raise ValueError(f"a column {column!r}, which the training file lacks: all rows of all files "
                             "need it, or none")
    read = read_list if is_by_word else read_value
    row = {column: read(column, row[column], values.get(column), column == target) for column in columns}
    if is_by_word and len({*map(len, row.values())}) > 1:
        counts = " and ".join(f"{len(entries)} {column}" for column, entries in row.items())
        raise ValueError(f"{counts}: every word needs one of each")
    return row


def read_list(column: str, value, allowed: dict | tuple | list | Callable | None, is_target: bool) -> list:
    """A list with an entry a word, in a table as JSON, each read as by `read_value`."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} must be a list with an entry a word, not {value!r:.60}")
    return [read_value(column, entry, allowed, is_target) for entry in value]


def read_value(column: str, value, allowed: dict | tuple | list | Callable | None, is_target: bool):
    """The value, as the function `allowed` reads it or as one of `allowed`; ValueError says what is wrong."""
    if callable(allowed):
        return allowed(value)
    if not isinstance(value, str) and not (is_target and type(value) is int):
        kind = "a string or an integer" if is_target else "a string"
        raise ValueError(f"column {column!r} must be {kind}, not {value!r}")
    if allowed and value not in allowed:
        known = [repr(known) if is_target else known for known in allowed]
        listed = ", ".join(known[:5]) + ", …" * (len(known) > 5)
        raise ValueError(f"{column} {value!r} is not one of {listed}")
    return allowed[value] if isinstance(allowed, dict) else value


def labels_of(rows: list[dict], column: str, place: str) -> list:
    """The labels that occur: integers by value, then strings by alphabet."""
    values = (row[column] for row in rows)
    found = {label for value in values for label in (value if isinstance(value, list) else [value])}
    labels = sorted(found, key=lambda label: (isinstance(label, str), label))
    if len(labels) < 2:
        raise UserError(f"{place} and all other rows have one label, {labels[0]!r}: add others")
    folded = [" ".join(str(label).casefold().split()) for label in labels]
    count = Counter(folded)
    if twins := [label for label, key in zip(labels, folded) if count[key] > 1]:
        print(f"note: labels that differ in type, case or white space alone count as different ones: {twins}")
    return labels


def sample(rows: list[dict], count: int | None, seed: int, stratified: bool = False) -> list[dict]:
    """`count` rows at random in their own order, or all; stratified: every label in its own share."""
    if count is None or count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    if stratified and "label" in rows[0]:
        by_label = {}
        for i in order:
            by_label.setdefault(rows[i]["label"], []).append(i)
        # The n-th of N rows of its label stands at (n + 1/2) / N: the first `count` hold each label's share.
        rank = {i: (n + 0.5) / len(same) for same in by_label.values() for n, i in enumerate(same)}
        order.sort(key=rank.get)
    return [rows[i] for i in sorted(order[:count])]
