"""Embeddings of a corpus of texts, computed once and kept on disk.

Letters: N texts, D elements of an embedding.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from recis_hybrid import distributed
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.validation import check_integer, check_type, describe_value

_FORMAT = b"recis_hybrid corpus 1\n"
# Of 64 hexadecimal digits; 128 bits.
_DIGITS = 32


class TextTokenizer(Protocol):
    """A function from texts to rows of token ids, such as ``features.Tokenize(...)``."""

    @property
    def digest(self) -> str:
        """Text that changes with everything that determines the token ids of a text."""

    def __call__(self, texts: Sequence[str]) -> RaggedTensor:
        """Return the token ids of texts, integers, without padding."""


def embed_corpus(
    tower: nn.Module,
    tokenize: TextTokenizer,
    corpus: Iterable[tuple[Any, Any]],
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 256,
    chunk_rows: int = 8192,
    progress: bool = True,
    group: dist.ProcessGroup | None = None,
) -> list[Path]:
    """Compute the embeddings of texts, except those that the folder already has.

    The corpus is cut into chunks, each a Parquet file with the columns ``id`` (int64) and ``embedding`` (a list of D
    float32). A file's path is a hash of the tower's weights, the tokenizer, and the ids and texts of the chunk. So a
    call that was killed continues where it was, and when texts are appended to the corpus, only the chunks that change
    are computed. Files of other weights, tokenizers and texts stay beside them; delete those that are not needed.

    The hash covers the parameters, buffers and ``repr`` of the tower, but not the code of its functions.

    The tower runs in evaluation mode, without gradients, on its own device. Equal texts of a chunk are computed once,
    and batches consist of texts of similar length.

    If several ranks run together, which join the default group here if a launcher has started them, the call is
    collective: every rank passes the whole corpus, and they compute the chunks in turns. The folder must then be shared
    by all ranks.

    Args:
        tower: A module from a RaggedTensor of token ids to ``[B, D]``, e.g. of :func:`hf_tower`.
        tokenize: The tower's tokenizer, e.g. ``features.Tokenize(path, max_length=128)``.
        corpus: Pairs of ids (integers ``[N]``) and texts (a list of strings, or a RaggedTensor of strings): one for all
            texts, ``[(ids, texts)]``, or an iterable of pairs, one of which is in memory at a time.
        folder: The folder of the files, which is created.
        batch_size: Texts that the tower takes at once.
        chunk_rows: Maximum number of texts in a file. Pairs are cut into chunks of this size.
        progress: Whether rank 0 shows a progress bar on stderr.
        group: The ranks; None: all.

    Returns:
        The files, in the order of the corpus. ``columnio.read_vectors(files, ids="id", vectors="embedding")`` reads
        them for :meth:`EmbeddingEngine.load_rows`, and ``ColumnDataset(files, ["id", "embedding"], ...)`` as columns.

    Raises:
        OtherRankError: If another rank failed.
        RuntimeError: If ranks passed different texts, towers or tokenizers, or do not share the folder.
        TypeError: If a text is None or not Unicode, or an argument has the wrong type.
        ValueError: If the tokenizer refuses a text, there are not as many ids as texts, or an embedding is not finite.
            The message names the row or the id.
    """
    check_type("embed_corpus", "tower", tower, nn.Module, "a torch.nn.Module, e.g. hf_tower(...)")
    check_integer("embed_corpus", "batch_size", batch_size, 1)
    check_integer("embed_corpus", "chunk_rows", chunk_rows, 1)
    if group is None:
        distributed.join("embed_corpus")
    run = _Run(tower, tokenize, Path(folder), batch_size, progress and distributed.rank(group) == 0)
    _compute_together(run, _chunks(corpus, chunk_rows), group)
    return list(dict.fromkeys(run.files))


@dataclass(frozen=True)
class _Chunk:
    """Some texts with their ids."""

    ids: Tensor
    """int64 ``[n]``."""
    texts: Sequence[str]
    place: str
    """The place in the corpus, for messages."""

    def name(self, key: str) -> str:
        """Return a hash of the content, and of the key of tower and tokenizer."""
        encoded = [text.encode() for text in self.texts]
        lengths = torch.tensor([len(text) for text in encoded])
        digest = hashlib.sha256(key.encode())
        for part in (self.ids, lengths):
            digest.update(part.numpy().astype("<i8").tobytes())
        digest.update(b"".join(encoded))
        return digest.hexdigest()[:_DIGITS]


def _chunks(corpus: Iterable[tuple[Any, Any]], rows: int) -> Iterator[_Chunk]:
    """Yield the checked texts of a corpus, at most ``rows`` at a time."""
    for number, pair in enumerate(corpus):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"embed_corpus: corpus must be pairs (ids, texts), got {describe_value(pair)}; pass [(ids, texts)] for "
                f"a single pair"
            )
        ids, texts = torch.as_tensor(pair[0]).detach().cpu(), pair[1]
        if isinstance(texts, RaggedTensor):
            texts = texts.to_strings()
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"embed_corpus: ids must be integers [N], got {ids.dtype} {list(ids.shape)}")
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"embed_corpus: texts must be a list of strings, got {describe_value(texts)}")
        if len(texts) != len(ids):
            raise ValueError(f"embed_corpus: there must be a text for each id, got {len(ids)} ids, {len(texts)} texts")
        for row, text in enumerate(texts):
            if not isinstance(text, str) or not _is_unicode(text):
                raise TypeError(
                    f"embed_corpus: texts must be strings of Unicode, got {text!r} in row {row} of pair {number} (id "
                    f"{int(ids[row])}); drop the row, or fill in a text"
                )
        ids = ids.view(torch.int64) if ids.dtype == torch.uint64 else ids.to(torch.int64)
        for first in range(0, len(texts), rows):
            yield _Chunk(ids[first : first + rows], texts[first : first + rows], f"pair {number} from row {first} on")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


@dataclass
class _Run:
    """One call of :func:`embed_corpus` on one rank."""

    tower: nn.Module
    tokenize: TextTokenizer
    folder: Path
    batch_size: int
    progress: bool
    files: list[Path] = field(default_factory=list)
    """The files of the chunks so far."""

    def compute(self, chunks: Iterable[_Chunk], rank: int, ranks: int) -> None:
        """Write the files of this rank's chunks that are missing."""
        key = _key(self.tower, self.tokenize)
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        modes = {module: module.training for module in self.tower.modules()}
        self.tower.eval()
        try:
            with tqdm(desc="embed", unit="text", dynamic_ncols=True, disable=not self.progress) as bar, torch.no_grad():
                for number, chunk in enumerate(chunks):
                    path = folder / f"{chunk.name(key)}.parquet"
                    self.files.append(path)
                    if number % ranks == rank and not _is_complete(path, len(chunk.texts)):
                        _write(path, chunk.ids, self._embed(chunk, bar.update))
                    else:
                        bar.update(len(chunk.texts))
        finally:
            for module, training in modes.items():
                module.training = training

    def _embed(self, chunk: _Chunk, advance: Callable[[int], object]) -> Tensor:
        """Return the embeddings of a chunk, float32 ``[n, D]`` on the CPU, and report the progress."""
        try:
            tokens = self.tokenize(chunk.texts)
        except ValueError as error:
            raise ValueError(f"embed_corpus: {chunk.place}: {error}") from error
        first = {text: row for row, text in reversed(list(enumerate(chunk.texts)))}
        distinct = torch.tensor(sorted(first.values()))
        # Batches of texts of similar length have little padding.
        order = distinct[tokens.lengths()[distinct].argsort(descending=True, stable=True)]
        parts = []
        for rows in order.split(self.batch_size):
            parts.append(self._run_tower(tokens[rows]))
            advance(len(rows))
        found = torch.cat(parts)
        embeddings = found.new_empty(len(chunk.texts), found.shape[1]).index_copy_(0, order, found)
        embeddings = embeddings[torch.tensor([first[text] for text in chunk.texts])]
        advance(len(chunk.texts) - len(distinct))
        _check_finite(embeddings, chunk.ids)
        return embeddings

    def _run_tower(self, tokens: RaggedTensor) -> Tensor:
        """Return the tower's output for some texts, float32 ``[B, D]`` on the CPU."""
        device = next((tensor.device for tensor in self.tower.parameters()), torch.device("cpu"))
        output = self.tower(tokens.to(device))
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(tokens):
            got = list(output.shape) if isinstance(output, Tensor) else describe_value(output)
            raise ValueError(f"embed_corpus: the tower must return [B, D] = [{len(tokens)}, D], got {got}; pool it")
        return output.float().cpu()


def _compute_together(run: _Run, chunks: Iterable[_Chunk], group: dist.ProcessGroup | None) -> None:
    """Compute a share of the chunks on each rank, and raise on all ranks if one fails or their files differ."""
    failure: Exception | None = None
    try:
        run.compute(chunks, distributed.rank(group), distributed.world_size(group))
    except Exception as error:
        failure = error
    try:
        # Hosts may mount the folder at different paths.
        names = [f"{path.parent.name}/{path.name}" for path in run.files]
        digest = hashlib.sha256("".join(names).encode()).hexdigest()
        digests = distributed.all_succeed_or_raise(failure, [digest, len(run.files)], group)
    finally:
        failure = None  # otherwise the exception and this frame would form a reference cycle
    if any(each != digests[0] for each in digests):
        raise RuntimeError(
            f"embed_corpus: all ranks must pass the same tower, tokenizer and texts, but their files differ; they have "
            f"{[count for _, count in digests]} chunks. Read the whole corpus on every rank, e.g. with "
            f"ShardOptions(rank=0, world_size=1)"
        )
    missing = [str(path) for path in run.files if not path.is_file()]
    if missing:
        raise RuntimeError(
            f"embed_corpus: {missing[0]} is missing, although another rank has written it; use a folder that all ranks "
            f"share"
        )


def _check_finite(embeddings: Tensor, ids: Tensor) -> None:
    """Raise ValueError with the first id whose embedding has a NaN or an infinity."""
    is_finite = embeddings.isfinite().all(1)
    if not bool(is_finite.all()):
        raise ValueError(
            f"embed_corpus: embeddings must be finite, got NaN or infinity for id "
            f"{int(ids[int(is_finite.int().argmin())])}; check the tower's weights, or compute it in float32"
        )


def _key(tower: nn.Module, tokenize: TextTokenizer) -> str:
    """Return a hash of the tower's weights and structure, and of the tokenizer."""
    # An address is all that the text of a function has besides its name, and differs in each process.
    structure = re.sub(r" at 0x[0-9a-f]+", "", str(tower))
    settings = [repr(getattr(tower, name, None)) for name in ("config", "framework", "pool")]
    state = {name: value for name, value in sorted(tower.state_dict().items()) if isinstance(value, Tensor)}
    tensors = [f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in state.items()]
    parts = [type(tower).__qualname__, structure, *settings, *tensors, tokenize.digest]
    digest = hashlib.sha256(_FORMAT + "\n".join(parts).encode())
    for tensor in state.values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def _is_complete(path: Path, rows: int) -> bool:
    """Return whether a file with this number of rows exists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return False
    try:
        if pq.read_metadata(path).num_rows == rows:
            return True
        fault = "it has another number of rows"
    except (OSError, pa.ArrowException) as error:
        fault = str(error)
    warnings.warn(f"embed_corpus: {path} is damaged ({fault}); it is computed again", RuntimeWarning, stacklevel=2)
    return False


def _write(path: Path, ids: Tensor, embeddings: Tensor) -> None:
    """Write a file that appears when it is complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.array(embeddings.flatten().numpy())
    columns = {"id": pa.array(ids.numpy()), "embedding": pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])}
    # Readers ignore names that begin with a dot.
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            pq.write_table(pa.table(columns), file, compression="none", use_dictionary=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
