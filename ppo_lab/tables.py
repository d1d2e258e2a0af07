"""Tables of prompts: JSON lines, JSON, CSV and Parquet files, and data sets of the hub, as columns
of Python values.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ppo_lab.errors import ConfigError

Columns = dict[str, list[Any]]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def find_file(path: str) -> Path:
    """The file of a data set.

    Raises:
        ConfigError: no path is given, there is no such file or no looking at it, or its name does
            not end like one of a table.
    """
    if not path:
        raise ConfigError(f"data.path: name the file of prompts ({', '.join(SUFFIXES)}).")
    try:
        file = Path(path).expanduser()
        is_file, is_folder = file.is_file(), file.is_dir()
    except (OSError, RuntimeError) as error:  # no permission; a home folder of nobody
        raise ConfigError(f"data.path={path}: cannot be read ({error}).") from error
    if not is_file:
        what = "this is a folder, not a file" if is_folder else "there is no such file"
        raise ConfigError(f"data.path={path}: {what} (looked for {file.absolute()}).")
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"data.path={path}: cannot tell the format; the name must end in {', '.join(SUFFIXES)}."
        )
    if file.stat().st_size == 0:
        raise ConfigError(f"data.path={path}: the file is empty.")
    return file


def read_file(file: Path, *, text_columns: tuple[str, ...] = ()) -> Columns:
    """Every column of a file, one value a row; a value that a row does not have is None.

    JSON is read as it stands: Arrow, underneath `datasets`, would make dates of strings that look
    like them. A column of a CSV file becomes numbers or truth values where all its cells are
    written as Python writes these, so that nothing is lost; else its cells are texts as they stand
    in the file (007, 0.50, null), as those of `text_columns` always are.

    Raises:
        ConfigError: the content is broken; the message names the row.
    """
    suffix = file.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _columns(list(_json_rows(file)))
    if suffix == ".parquet":
        return _parquet_columns(file)
    return _csv_columns(file, text_columns)


def column_names(file: Path) -> list[str]:
    """The columns of a file, from its first row or its header alone."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(file).names)
        except (OSError, ValueError) as error:
            raise _broken(file, error) from error
    if suffix in (".csv", ".tsv"):
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                return next(csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ","), [])
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise _broken(file, error) from error
    first = next(_json_rows(file), {})
    return list(first)


def require_column(names: Sequence[str], wanted: str, *, key: str, path: str) -> None:
    """Nothing, if a column is among those of a file; `key` is the setting that names it.

    Raises:
        ConfigError: it is not; with the nearest, or what separates the header instead of commas.
    """
    if wanted in names or not names:
        return
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f" Did you mean {key}={near[0]}?" if near else ""
    for mark in ";\t|":
        if len(names) == 1 and mark in names[0]:
            hint = f" It seems to be separated by {mark!r}, and is read by commas."
    raise ConfigError(
        f"{key}={wanted}: {path} has no such column; it has {', '.join(names)}.{hint}"
    )


def read_hub(
    path: str, *, name: str = "", split: str = "train", revision: str = "", limit: int = 0
) -> Columns:
    """Every column of one split of a data set on the hub, through the usual cache; `limit` rows.

    Raises:
        ConfigError: it cannot be had, or has no such configuration or split.
    """
    import datasets

    if not path:
        raise ConfigError("data.path: name the data set on the hub, as owner/name.")
    try:
        with _no_progress_bars(), _without_waiting(path, revision):
            table = datasets.load_dataset(
                path, name or None, split=split, revision=revision or None
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"data.path={path}: the data set cannot be had from the hub ({reason}). "
            "Check data.path, data.subset, data.split and data.revision; where the hub cannot be "
            "reached, set HF_HOME to a cache that holds it, or use a file of your own: data=file "
            "data.path=FILE."
        ) from error
    return table.select(range(min(limit or len(table), len(table)))).to_dict()


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, or of a JSON file that is one list of objects."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            start = lines.read(1)
            while start.isspace():
                start = lines.read(1)
            lines.seek(0)
            rows = _listed(file, lines) if start == "[" else _parsed(file, lines)
            for number, row in rows:
                if not isinstance(row, dict):
                    raise ConfigError(
                        f"data.path={file}: row {number} is {type(row).__name__}, "
                        "not an object with columns."
                    )
                yield row
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # or beyond Python's limits
        raise _broken(file, error) from error


def _listed(file: Path, lines: Any) -> Iterator[tuple[int, Any]]:
    """Each item of a file that is one list, with its number."""
    try:
        yield from enumerate(json.load(lines), 1)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        raise ConfigError(
            f"data.path={file}: its first line is a list; each line must be an object with the "
            "columns, or the whole file one list of such objects."
        ) from error


def _parsed(file: Path, lines: Any) -> Iterator[tuple[int, Any]]:
    """Each line that is not blank, with its number."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"data.path={file}: row {number} is no valid JSON ({error})."
            ) from error


def _columns(rows: list[dict[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _csv_columns(file: Path, text_columns: Sequence[str]) -> Columns:
    """The columns of a CSV or TSV file; an empty cell is None, and in `text_columns` empty."""
    import pandas

    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        table = pandas.read_csv(file, sep=separator, dtype=str, na_filter=False)
    except (OSError, ValueError) as error:
        raise _broken(file, error) from error
    if not isinstance(table.index, pandas.RangeIndex):  # made of fields that have no name
        raise ConfigError(f"data.path={file}: rows have more fields than the header names.")
    read = {str(name): table[name].tolist() for name in table}
    return {
        name: cells if name in text_columns else _typed([cell or None for cell in cells])
        for name, cells in read.items()
    }


def _typed(cells: list[str | None]) -> list[Any]:
    """Cells as whole numbers, numbers or truth values, if each is written as Python writes one."""
    for kind in (_number, _truth):
        if all(cell is None or _written_as(kind, cell) for cell in cells):
            return [None if cell is None else kind(cell) for cell in cells]
    return list(cells)


def _written_as(kind: Callable[[str], Any], cell: str) -> bool:
    try:
        value = kind(cell)
        return repr(value) == cell and math.isfinite(value)
    except (ValueError, OverflowError):
        return False


def _number(cell: str) -> int | float:
    """Whole where it is written so, beside others that are not."""
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)


def _truth(cell: str) -> bool:
    return {"True": True, "False": False}.get(cell, False)


def _parquet_columns(file: Path) -> Columns:
    """A Parquet file through `datasets`, its cache in a folder that is gone afterwards."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="ppo_lab-") as cache, _no_progress_bars():
        try:
            read = datasets.Dataset.from_parquet
            return read(str(file), cache_dir=cache, keep_in_memory=True).to_dict()
        except (datasets.exceptions.DatasetGenerationError, OSError) as error:
            raise _broken(file, error.__cause__ or error) from error
        except ValueError as error:
            if "no data" in str(error):
                return {name: [] for name in column_names(file)}
            raise _broken(file, error) from error


@contextlib.contextmanager
def _without_waiting(path: str, revision: str) -> Iterator[None]:
    """`datasets` told to look into its cache alone, where the hub does not answer one request.

    Its own attempts and waits take half a minute on a machine without a network.
    """
    import datasets
    import httpx
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(path, revision=revision or None, timeout=10)
        silent = False
    except (httpx.TransportError, huggingface_hub.errors.OfflineModeIsEnabled):
        silent = True
    except huggingface_hub.errors.HfHubHTTPError:
        silent = False  # `datasets` says more about what is wrong
    places = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place, offline in zip(places, before, strict=True):
        place.HF_HUB_OFFLINE = silent or offline
    try:
        yield
    finally:
        for place, offline in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = offline


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """`datasets` without progress bars and without its own account of an error that we report."""
    import datasets

    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _broken(file: Path, error: BaseException) -> ConfigError:
    return ConfigError(f"data.path={file}: the file cannot be read ({error}).")
