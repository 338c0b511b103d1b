"""Tokenize: text to token ids, by the tokenizer of a Hugging Face model.

Letters: B rows of a batch, L tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from recis_hybrid.features.op import Column, Form, Kernel
from recis_hybrid.features.ops.shaping import count_fault
from recis_hybrid.ragged import RaggedTensor, build

# Texts of one call of the library, which tokenizes them without holding the GIL.
_TEXTS = 512
# Families whose positions start behind the id of padding.
_SHIFTED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm")


@dataclass(frozen=True)
class Tokenize:
    """Text → token ids by a tokenizer of the Hugging Face ``tokenizers`` library.

    Strings become rows of token ids, int64, with the special tokens that the tokenizer adds, such as ``[CLS]``. Lists
    of strings become lists of rows. Equal texts of a batch are tokenized once. The results are those of
    ``transformers.AutoTokenizer`` if it uses ``tokenizer.json`` without changes.

    With ``pad_to``, a feature ``f`` that ends with the operation becomes two columns: ``f_input_ids``, int64
    ``[B, L]``, and ``f_attention_mask``, int64 ``[B, L]``, 1 for tokens and 0 for padding. L is the smallest length
    that fits the batch, of those in ``pad_to`` and ``max_length``. So there are only a few shapes, and compilers need
    not compile for every batch.

    Tokenizing runs in the calling thread; readers run it in theirs (see :meth:`FeatureEngine.reading_part`). The
    library's own threads, which hang in forked processes, are switched off for this process and its children by
    ``TOKENIZERS_PARALLELISM=false``.

    The operation is also a function from texts to their token ids, ``Tokenize(...)(["red phone"])``.

    Args:
        path: A ``tokenizer.json``, or the folder of a model that contains it. If there is a ``config.json`` beside it,
            ``max_length`` and the vocabulary must fit the model.
        max_length: Maximum number of tokens, with special tokens.
        truncate: Whether to truncate longer texts, instead of refusing them.
        pad_to: Lengths to pad to, in addition to ``max_length``; None returns rows of unequal length.
        pad_id: Token id of padding; None takes it from the files of the model.
        allow_empty: Whether to accept texts without tokens (other than special ones), such as ``""``.

    Raises:
        ImportError: If ``tokenizers`` is not installed.
        ValueError: If the files cannot be read, or do not fit the arguments or each other. In a batch: if a text is not
            UTF-8, empty or too long; the message names its row.

    Example:
        >>> titles = Tokenize("all-MiniLM-L6-v2", max_length=64, truncate=True, pad_to=[16, 32])  # doctest: +SKIP
        >>> engine = FeatureEngine([Feature("title", ops=[titles])])  # doctest: +SKIP
        >>> engine({"title": RaggedTensor.from_strings(["red phone case"])})  # doctest: +SKIP
        {'title_input_ids': tensor([[ 101, 2417, ...]]), 'title_attention_mask': tensor([[1, 1, ...]])}
    """

    path: str | PathLike[str]
    max_length: int
    truncate: bool = False
    pad_to: Sequence[int] | None = None
    pad_id: int | None = None
    allow_empty: bool = False
    suffixes: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def __post_init__(self) -> None:
        if isinstance(self.path, PathLike):
            object.__setattr__(self, "path", os.fspath(self.path))
        if isinstance(self.pad_to, Iterable) and not isinstance(self.pad_to, str):
            object.__setattr__(self, "pad_to", tuple(self.pad_to))

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        if not isinstance(self.path, str) or not self.file.is_file():
            return f"path must be a tokenizer.json, or a folder with one, got {self.path!r}"
        for name in ("truncate", "allow_empty"):
            if not isinstance(getattr(self, name), bool):
                return f"{name} must be True or False, got {getattr(self, name)!r}"
        if fault := count_fault("max_length", self.max_length, least=1):
            return fault
        if self.pad_id is not None and (fault := count_fault("pad_id", self.pad_id, least=0)):
            return fault
        if self.pad_to is None:
            return None if self.pad_id is None else f"pad_id is for pad_to=[...], got pad_id={self.pad_id} without it"
        if not isinstance(self.pad_to, tuple):
            return f"pad_to must be a list of lengths or None, got {self.pad_to!r}"
        for length in self.pad_to:
            if count_fault("pad_to", length, least=1) or length > self.max_length:
                return f"pad_to must be lengths from 1 to max_length, {self.max_length}, got {length!r}"
        return None

    @property
    def file(self) -> Path:
        """The ``tokenizer.json``."""
        path = Path(self.path)
        return path / "tokenizer.json" if path.is_dir() else path

    def expand(self) -> Sequence[Sequence[Any]]:
        """Return the operations that it consists of."""
        tokens = TokenIds(replace(self, pad_to=None, pad_id=None))
        if self.pad_to is None:
            return [[tokens]]
        lengths = tuple(sorted({*self.pad_to, self.max_length}))
        return [[tokens, PadTokens(str(self.file), lengths, self.pad_id)], [tokens, TokenMask(lengths)]]

    def __call__(self, texts: Sequence[str]) -> RaggedTensor:
        """Return the token ids of texts, int64, without padding; raises as a feature does."""
        if isinstance(texts, str):
            raise TypeError(f"Tokenize: texts must be a list of strings, got {texts!r}; write [{texts!r}]")
        tokens = _kernel_of(TokenIds(replace(self, pad_to=None, pad_id=None)), self.digest)
        column = tokens(Column.of(RaggedTensor.from_strings(texts)))
        assert column.offsets is not None
        return RaggedTensor(column.values, column.offsets)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the token ids of a text, as 64 hexadecimal digits."""
        settings = f"{self.max_length}, {self.truncate}, {self.allow_empty}\n".encode()
        return hashlib.sha256(settings + self.file.read_bytes()).hexdigest()

    def load(self) -> Any:
        """Return the tokenizer, as a ``tokenizers.Tokenizer`` with these settings; see the class for errors."""
        tokenizer = _load(self.file)
        _check_model(self.file, tokenizer, self.max_length)
        special = tokenizer.num_special_tokens_to_add(False)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if self.truncate:
            if self.max_length <= special:
                raise ValueError(
                    f"Tokenize: max_length must leave room for text beside the {special} special tokens of "
                    f"{self.file}, got {self.max_length}"
                )
            tokenizer.enable_truncation(self.max_length)
        return tokenizer

    def __str__(self) -> str:
        return f"tokenize[{self.file.parent.name}, {self.max_length}]"


@dataclass(frozen=True)
class TokenIds:
    """Text → rows of token ids: the part of :class:`Tokenize` without padding."""

    settings: Tokenize
    in_reader: ClassVar[bool] = True

    def fault(self) -> str | None:
        """Return what is wrong with the settings, or None."""
        return self.settings.fault()

    def kernel(self) -> Kernel:
        """Load the tokenizer, and return the kernel."""
        tokenizer = self.settings.load()

        def kernel(column: Column) -> Column:
            form = Form.of(column)
            if not form.strings or form.dims != 1:
                raise TypeError(f"Tokenize takes strings, got {form.dtype}; read the column as Text()")
            if form.weighted:
                raise TypeError("Tokenize takes strings without weights, because tokens have none; drop the weights")
            assert column.offsets is not None
            encoded = build.listed(column.values.cpu().numpy().tobytes(), [column.offsets])
            texts = build.decoded("Tokenize", encoded, column.outer)
            distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
            rows = _encode(tokenizer, list(distinct))
            self._check(tokenizer, texts, distinct, rows, column.outer)
            ids = np.fromiter(chain.from_iterable(rows), np.int64, sum(map(len, rows)))
            tokens = RaggedTensor(torch.from_numpy(ids), build.offsets_of([len(row) for row in rows]))
            if len(distinct) < len(texts):
                tokens = tokens[torch.tensor([distinct[text] for text in texts])]
            tokens = tokens.to(column.values.device)
            return Column(tokens.values, tokens.offsets, None, column.outer)

        return kernel

    def _check(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        distinct: dict[str, int],
        rows: Sequence[Sequence[int]],
        outer: Sequence[torch.Tensor],
    ) -> None:
        """Raise ValueError if a text has no tokens, or too many."""
        least = 0 if self.settings.allow_empty else 1 + tokenizer.num_special_tokens_to_add(False)
        for text, place in distinct.items():
            if least <= len(rows[place]) <= self.settings.max_length:
                continue
            if len(rows[place]) < least:
                rule = "texts must not be empty"
                remedy = "correct it, drop its row, or accept such texts with allow_empty=True"
            else:
                rule = f"texts must have at most {self.settings.max_length} tokens"
                remedy = f"it has {len(rows[place])}; raise max_length, or set truncate=True"
            shown = repr(text) if len(text) <= 40 else f"{text[:40]!r}..."
            raise ValueError(f"{rule}, got {shown} in row {build.row_of(texts.index(text), outer)}; {remedy}")

    def __str__(self) -> str:
        return str(self.settings)


@lru_cache(maxsize=4)
def _kernel_of(op: TokenIds, digest: str) -> Kernel:
    """Return the kernel of an operation, loaded once for each content of its file."""
    return op.kernel()


@dataclass(frozen=True)
class PadTokens:
    """Rows of token ids → int64 ``[B, L]``, for L the smallest of some lengths that fits all rows.

    Args:
        file: The ``tokenizer.json``.
        lengths: The lengths, ascending.
        pad_id: Token id of padding; None takes it from the files of the model.
    """

    file: str
    lengths: tuple[int, ...]
    pad_id: int | None
    in_reader: ClassVar[bool] = True

    def fault(self) -> str | None:
        """Return None; :class:`Tokenize` has checked the parameters."""
        return None

    def kernel(self) -> Kernel:
        """Return the kernel."""
        pad_id = _pad_id(Path(self.file)) if self.pad_id is None else self.pad_id

        def kernel(column: Column) -> Column:
            rows = _rows(column)
            return Column(rows.to_padded(_length(rows, self.lengths), padding=pad_id))

        return kernel

    def __str__(self) -> str:
        return f"pad_tokens[{', '.join(map(str, self.lengths))}]"


@dataclass(frozen=True)
class TokenMask:
    """Rows of token ids → int64 ``[B, L]``: 1 for each token, 0 for padding; L as for :class:`PadTokens`."""

    lengths: tuple[int, ...]
    in_reader: ClassVar[bool] = True

    def fault(self) -> str | None:
        """Return None; :class:`Tokenize` has checked the parameters."""
        return None

    def kernel(self) -> Kernel:
        """Return the kernel."""

        def kernel(column: Column) -> Column:
            rows = _rows(column)
            places = torch.arange(_length(rows, self.lengths), device=rows.device)
            return Column((places < rows.lengths()[:, None]).to(torch.int64))

        return kernel

    def __str__(self) -> str:
        return f"token_mask[{', '.join(map(str, self.lengths))}]"


def _rows(column: Column) -> RaggedTensor:
    if column.outer:
        raise TypeError(
            "pad_to takes one text per row, got lists of texts; omit it, and pad the rows of tokens before the tower"
        )
    assert column.offsets is not None
    return RaggedTensor.unchecked(column.values, column.offsets, None, ())


def _length(rows: RaggedTensor, lengths: Sequence[int]) -> int:
    longest = int(rows.lengths().max()) if len(rows) else 0
    return next(length for length in lengths if length >= longest)


def _load(file: Path) -> Any:
    """Return the tokenizer of a file, as a ``tokenizers.Tokenizer``."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            "Tokenize needs the package tokenizers, which is not installed; run pip install 'recis_hybrid[pretrained]'"
        ) from error
    # The library starts threads for batches, and waits forever for them in a process that was forked after that. It
    # reads the variable for each batch. Readers have threads of their own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises this very class
        raise ValueError(
            f"Tokenize: {file} is not a tokenizer of the tokenizers library ({error}); get it again, or save it with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    parts = (texts[first : first + _TEXTS] for first in range(0, len(texts), _TEXTS))
    return [encoding.ids for part in parts for encoding in tokenizer.encode_batch_fast(part)]


def _json_beside(file: Path, name: str) -> dict[str, Any]:
    """Return the content of a JSON file beside another one; empty if it does not exist."""
    path = file.parent / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Tokenize: {path} is not JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"Tokenize: {path} must be a JSON object, got a {type(content).__name__}; get it again")
    return content


def _model_config(file: Path) -> dict[str, Any]:
    """Return the configuration of the text model beside a tokenizer."""
    config = _json_beside(file, "config.json")
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _check_model(file: Path, tokenizer: Any, max_length: int) -> None:
    """Raise ValueError if the model beside a tokenizer lacks token ids or positions."""
    config = _model_config(file)
    greatest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    rows, positions = config.get("vocab_size"), config.get("max_position_embeddings")
    if isinstance(rows, int) and greatest >= rows:
        raise ValueError(
            f"Tokenize: {file} has token ids up to {greatest}, but the model in the same folder has {rows} tokens "
            f"(vocab_size in config.json); use the tokenizer that belongs to the model"
        )
    if isinstance(positions, int) and config.get("model_type") in _SHIFTED_POSITIONS:
        positions -= int(config.get("pad_token_id", 1)) + 1
    if isinstance(positions, int) and max_length > positions:
        raise ValueError(
            f"Tokenize: max_length must be at most {positions}, because the model in {file.parent} has no more "
            f"positions (max_position_embeddings in config.json), got {max_length}"
        )


def _pad_id(file: Path) -> int:
    """Return the token id of padding, according to the files of a model."""
    config = _model_config(file).get("pad_token_id")
    if isinstance(config, int):
        return config
    tokenizer = _load(file)
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    token = _json_beside(file, "tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise ValueError(f"Tokenize: the files beside {file} name no padding token; set pad_id= to an id to pad with")
    return int(found)
