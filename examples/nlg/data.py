"""E2E, DART and WebNLG as contexts and completions, from a file or a hub, and as token ids."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.errors import InputError

__all__ = [
    "SEEN_CATEGORIES",
    "TASKS",
    "Example",
    "Group",
    "encode",
    "group",
    "load",
    "read_text",
    "split_by_context",
]

TASKS = ("e2e", "dart", "webnlg")

# The categories of WebNLG 2017 that its training part has; the test part has five more.
SEEN_CATEGORIES = frozenset(
    ("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument",
     "SportsTeam", "University", "WrittenWork")
)  # fmt: skip

# E2E's attributes as the challenge writes them -> as the paper's files do.
E2E_NAMES = {
    "eatType": "Type",
    "priceRange": "price",
    "familyFriendly": "family friendly",
}


@dataclass(frozen=True)
class Example:
    """One text to generate. category: WebNLG's, None elsewhere."""

    context: str
    completion: str
    category: str | None = None


@dataclass(frozen=True)
class Group:
    """All texts of one context, in the order of the file: what a prediction is compared with."""

    context: str
    references: tuple[str, ...]
    category: str | None = None


def load(task: str, source: str | Path, split: str = "train") -> list[Example]:
    """Examples of a local file in the format of its authors, or else of a data set of the hub.

    E2E: lines `context||completion`. DART and WebNLG: JSON; a context is
    `subject : relation : object | ...`; blank texts are left out. split says which part of a
    hub's data set, and is not looked at for files. Raises: InputError that names file and place.
    """
    if Path(source).is_file():
        examples = _FROM_FILE[task](Path(source))
    else:
        examples = _from_hub(task, str(source), split)
    if not examples:
        raise InputError(f"{source}: no examples in it")
    return examples


def group(examples: Iterable[Example]) -> list[Group]:
    """Examples of the same context together, contexts in the order of their first line."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.context, []).append(example)
    return [
        Group(context, tuple(e.completion for e in members), members[0].category)
        for context, members in groups.items()
    ]


def split_by_context(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held out): share of the contexts, at least one, goes with all their texts."""
    contexts = list(dict.fromkeys(example.context for example in examples))
    size = max(1, round(share * len(contexts)))
    if size >= len(contexts):
        raise InputError(f"cannot hold out {size} of {len(contexts)} contexts")
    chosen = set(random.Random(seed).sample(contexts, size))
    return (
        [example for example in examples if example.context not in chosen],
        [example for example in examples if example.context in chosen],
    )


def encode(tokenizer, examples: Iterable[Example], max_length: int) -> list[dict]:
    """Token ids of context, end-of-text, ' ' + completion, end-of-text; labels of the completion.

    labels are -100 where a token is not to be predicted. Cut at max_length from the right. An
    example whose context alone fills max_length has nothing to learn from and is left out.
    """
    end, features = tokenizer.eos_token_id, []
    for example in examples:
        context = [*tokenizer(example.context)["input_ids"], end]
        completion = [*tokenizer(" " + example.completion)["input_ids"], end]
        if len(context) < max_length:
            features.append(
                {
                    "input_ids": (context + completion)[:max_length],
                    "labels": ([-100] * len(context) + completion)[:max_length],
                }
            )
    return features


# ---- files ----


def _read_e2e(path: Path) -> list[Example]:
    examples = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        parts = line.strip().split("||")
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise InputError(f"{path}:{number}: must be context||completion, got {line.strip()!r}")
        examples.append(Example(parts[0], parts[1]))
    return examples


def _read_dart(path: Path) -> list[Example]:
    content = _json(path)
    if not isinstance(content, list):
        raise InputError(f"{path}: must be a list")
    return _examples(path, content, _dart_row)


def _read_webnlg(path: Path) -> list[Example]:
    content = _json(path)
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise InputError(f"{path}: must be an object with a list called entries")
    return _examples(path, content["entries"], lambda row: _webnlg_row(*row.values()))


_FROM_FILE = {"e2e": _read_e2e, "dart": _read_dart, "webnlg": _read_webnlg}


def _dart_row(row: dict) -> list[Example]:
    context = _triples((s, relation.lower(), o) for s, relation, o in row["tripleset"])
    return [Example(context, annotation["text"]) for annotation in row["annotations"]]


def _webnlg_row(entry: dict) -> list[Example]:
    context = _triples(
        (triple["subject"], triple["property"], triple["object"])
        for triple in entry["modifiedtripleset"]
    )
    return [
        Example(context, text["lex"], entry["category"])
        for text in entry["lexicalisations"]
        if text["comment"] == "good"
    ]


def _triples(triples: Iterable[tuple[str, str, str]]) -> str:
    return " | ".join(" : ".join(triple) for triple in triples)


def _examples(source, rows: Iterable, convert) -> list[Example]:
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            examples += [example for example in convert(row) if example.completion.strip()]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: entry {number}: {type(error).__name__}: {error}") from None
    return examples


def read_text(path: Path) -> str:
    """Raises: InputError that names the file."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _json(path: Path):
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: no JSON: {error}") from None


# ---- the hub ----


def _from_hub(task: str, name: str, split: str) -> list[Example]:
    try:
        import datasets  # seconds to import, and files need it not
    except ImportError:
        raise InputError(
            f"{name}: no such file; `pip install datasets` to look for it on the hub"
        ) from None
    try:
        rows = datasets.load_dataset(*name.split(":", 1), split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: neither a file nor a data set with a split {split!r}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    return _examples(name, rows, _FROM_ROW[task])


def _e2e_hub_row(row: dict) -> list[Example]:
    """`name[The Eagle], eatType[pub]` becomes `name : The Eagle | Type : pub`."""
    slots = [
        slot.removesuffix("]").split("[", 1)
        for slot in row["meaning_representation"].strip().split("], ")
    ]
    context = " | ".join(f"{E2E_NAMES.get(name, name)} : {value}" for name, value in slots)
    return [Example(context, row["human_reference"])]


def _dart_hub_row(row: dict) -> list[Example]:
    texts = _records(row["annotations"])
    return _dart_row({"tripleset": row["tripleset"], "annotations": texts})


def _webnlg_hub_row(row: dict) -> list[Example]:
    triples = _records(row["modified_triple_sets"])[0]["mtriple_set"]
    context = _triples(tuple(triple.split(" | ")) for triple in triples)
    return [
        Example(context, text["text"], row["category"])
        for text in _records(row["lex"])
        if text["comment"] == "good"
    ]


def _records(value) -> list[dict]:
    """A list of records, which some data sets keep as a record of lists."""
    if isinstance(value, dict):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return list(value)


_FROM_ROW = {"e2e": _e2e_hub_row, "dart": _dart_hub_row, "webnlg": _webnlg_hub_row}
