"""Error messages name the feature and the remedy."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from recis_hybrid.features import (
    Bucketize,
    Cast,
    Clip,
    Column,
    Concat,
    Cross,
    Feature,
    FeatureEngine,
    FillNull,
    Hash,
    Log,
    Mod,
    MultiHash,
    MultiHot,
    Normalize,
    OneHot,
    Pad,
    StringMultiHash,
    Tile,
    ToDense,
    TopK,
    Truncate,
    Vocabulary,
    make_op,
    register_op,
    registered_ops,
)
from recis_hybrid.features.program.lowering import run_alone
from recis_hybrid.features.program.plan import compile_plan
from recis_hybrid.ragged import RaggedTensor
from tests.support.devices import on_accelerators
from tests.support.features import fused_or_not, run

ROWS = RaggedTensor.from_lists([[1, 2, 3], [4]])
WEIGHTED = RaggedTensor.from_lists([[1, 2], [3]], weights=[[1, math.nan], [2]])
NESTED = RaggedTensor.from_lists([[[1]], [[2]]])
DECREASING = RaggedTensor.unchecked(torch.arange(4), torch.tensor([0, 3, 2, 4]))
NAN = torch.tensor([1.0, math.nan])
WORDS = RaggedTensor.from_strings(["a", "b"])


@fused_or_not
@pytest.mark.parametrize(
    ("ops", "columns", "error", "message"),
    [
        ([Bucketize([0])], [NAN], ValueError, "element 1 is NaN"),
        ([Clip(0, 1)], [NAN], ValueError, "element 1 is NaN"),
        ([Normalize(0, 1)], [NAN], ValueError, "element 1 is NaN"),
        ([Log()], [torch.tensor([1.0, 0.0])], ValueError, "element 1 has no logarithm"),
        ([Log()], [NAN], ValueError, "element 1 has no logarithm"),
        ([Cast(torch.int64)], [NAN], ValueError, "element 1 is NaN or outside the range of int64"),
        ([Cast(torch.int64)], [torch.tensor([1e19])], ValueError, "element 0 is NaN or outside the range of int64"),
        ([Vocabulary(["a"])], [WORDS], ValueError, "is not in the vocabulary; set unknown= to accept it"),
        ([Vocabulary([1])], [torch.tensor([1, 2])], ValueError, "is not in the vocabulary"),
        ([Vocabulary(["a"])], [torch.tensor([1])], TypeError, "has strings as entries, and the column has torch.int64"),
        ([Vocabulary([1])], [WORDS], TypeError, "has integers as entries, and the column has strings"),
        ([ToDense(2)], [ROWS], ValueError, "row 0 is longer than length= (put Truncate before it)"),
        (
            [ToDense(3)],
            [DECREASING],
            ValueError,
            "offsets must not decrease, got 3 and then 2 at row 1. They were modified",
        ),
        (
            [Mod(9)],
            [DECREASING],
            ValueError,
            "offsets must not decrease, got 3 and then 2 at row 1. They were modified after",
        ),
        ([], [DECREASING], ValueError, "build a new RaggedTensor instead of writing to the offsets of a column"),
        ([ToDense(2)], [torch.ones(2)], TypeError, "takes ragged columns, got a dense one"),
        ([ToDense(2)], [WEIGHTED], TypeError, "would drop the weights"),
        ([ToDense(2)], [NESTED], TypeError, "got rows of lists"),
        ([Truncate(2)], [torch.ones(2)], TypeError, "Truncate takes ragged columns, got a dense one"),
        ([Truncate(2, level=2)], [ROWS], TypeError, "level must be 1 to 1 for this column, got 2"),
        ([Pad(2, 0.5)], [ROWS], TypeError, "a column of torch.int64 cannot hold the value 0.5"),
        ([FillNull(0)], [torch.tensor([1])], TypeError, "a dense column of integers"),
        ([FillNull(0)], [NESTED], TypeError, "got rows of lists; use Pad"),
        ([TopK(1)], [ROWS], TypeError, "rows of weighted values"),
        ([TopK(1)], [WEIGHTED], ValueError, "row 0 has a NaN weight"),
        (
            [OneHot(3)],
            [torch.tensor([0, 3])],
            ValueError,
            "row 1 has an id outside [0, classes) (put Mod or Clip before it)",
        ),
        ([MultiHot(3)], [ROWS], ValueError, "row "),
        ([OneHot(3)], [ROWS], TypeError, "MultiHot takes several"),
        ([Tile(2)], [NESTED], TypeError, "got rows of lists"),
        ([Cross()], [ROWS, torch.ones(2)], TypeError, "Cross takes integers, got torch.float32"),
        ([Cross()], [ROWS, torch.ones(2, 2, dtype=torch.int64)], TypeError, "values of 2 dimensions; reshape them"),
        (
            [Cross()],
            [torch.tensor([1, 2]), torch.tensor([1])],
            ValueError,
            "rows; all columns of a batch must have the same number of rows",
        ),
        ([Cross()], [ROWS, torch.tensor([1])], ValueError, "has 1 rows and column 'c0' has 2 rows"),
        ([Cross(limit=2)], [ROWS, ROWS], ValueError, "has more pairs than limit="),
        ([Concat()], [ROWS, torch.ones(2)], TypeError, "columns of integers, or of one float dtype"),
        ([Concat()], [ROWS, torch.tensor([1])], ValueError, "has 1 rows and column 'c0' has 2 rows"),
        ([Concat()], [ROWS, NESTED], TypeError, "put ToDense or Truncate before it"),
        ([Mod(2)], [WORDS], TypeError, "put a Hash before it"),
        ([MultiHash([5])], [torch.ones(2)], TypeError, "MultiHash takes integers"),
        ([Clip(0.5, 1)], [torch.tensor([1])], TypeError, "requires integer bounds, got 0.5"),
        (
            [FillNull(1e300)],
            [torch.ones(2)],
            TypeError,
            "FillNull: a column of torch.float32 cannot hold the value 1e+300",
        ),
        ([Log(1e39)], [torch.ones(2)], TypeError, "Log: a column of torch.float32 cannot hold the value 1e+39"),
        ([Normalize(0, 1e-60)], [torch.tensor([1])], TypeError, "Normalize: a column of torch.float32 cannot hold"),
        ([Normalize(0, 1)], [WORDS], TypeError, "Normalize takes int8 to int64, float32 or float64"),
    ],
)
def test_errors_name_the_feature(
    fuse: bool, ops: list[Any], columns: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^feature 'price', .*{re.escape(message)}"):
        run(ops, fuse, *columns, name="price")


@fused_or_not
@pytest.mark.parametrize("kind", ["numbers", "strings", "lists", "lists of strings"])
@pytest.mark.parametrize("offsets", [[0, 5, 3], [0, 1, 4], [-1, 1, 3], [0, 2**62, 3], [1, 2, 3], [0, 1, 2]])
def test_overwritten_offsets_are_refused(fuse: bool, kind: str, offsets: list[int]) -> None:
    columns = {
        "numbers": RaggedTensor.from_lists([[1, 2], [3]], weights=[[1, 2], [3]]),
        "strings": RaggedTensor.from_strings(["ab", "c"]),
        "lists": RaggedTensor.from_lists([[[1], [2, 4]], [[3]]]),
        "lists of strings": RaggedTensor.from_strings([["a", "bc"], ["d"]]),
    }
    column = columns[kind]
    level = column.outer[0] if column.outer else column.offsets
    level.copy_(torch.tensor(offsets))
    with pytest.raises(
        ValueError, match=r"^feature 'a', column 'a': .*(offsets|outer\[0\]) must .* build a new Ragged"
    ):
        FeatureEngine([Feature("a", ops=[Hash(), Mod(7)])], fuse=fuse)({"good": torch.ones(2), "a": column})


def run_kernels(ops: list[Any], *columns: Column) -> None:
    """Run a feature as torch.compile does, without the checks of columns."""
    names = [f"c{k}" for k in range(len(columns))]
    registers = list(columns)
    for instruction in compile_plan([Feature("a", ops=ops, source=names)]).instructions:
        registers.append(run_alone(instruction, [registers[source] for source in instruction.sources]))


@pytest.mark.parametrize(
    "ops", [[Truncate(1)], [Pad(4)], [TopK(1)], [MultiHot(9)], [Tile(2)], [Hash(), Truncate(2)], [FillNull(2)]]
)
@pytest.mark.parametrize("offsets", [[0, 5, 3], [0, 1, 4], [-1, 1, 3], [0, 2**62, 3]])
def test_kernels_that_read_rows_do_not_follow_bad_offsets(ops: list[Any], offsets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^feature 'a', .*offsets"):
        run_kernels(ops, Column(torch.tensor([1, 2, 3]), torch.tensor(offsets), torch.ones(3)))


@pytest.mark.parametrize("op", [Tile(2), Concat()])
@pytest.mark.parametrize(("offsets", "row"), [([1, 2, 3], 0), ([0, 1, 2], 1)])
def test_kernels_refuse_offsets_that_omit_values(op: Any, offsets: list[int], row: int) -> None:
    column = Column(torch.tensor([1, 2, 3]), torch.tensor(offsets), torch.ones(3))
    with pytest.raises(ValueError, match=f"^feature 'a', .*: row {row} has offsets that decrease or lie outside"):
        run_kernels([op], *[column] * (2 if isinstance(op, Concat) else 1))


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (MultiHash([]), "buckets must be a list of one to 4 ints"),
        (MultiHash([0]), "buckets must be ints from 1"),
        (StringMultiHash([1], ["farm", "djb2"]), "buckets must hold one element for each of kinds"),
        (StringMultiHash([None], ["md5"]), "kind must be one of"),  # type: ignore[list-item]
        (Log(math.nan), "plus must be a number, got NaN"),
        (Clip(2, 1), "least must not be above most, got 2 and 1; swap them"),
        (Clip("0", 1), "least must be a number, got '0'"),  # type: ignore[arg-type]
        (Normalize(0, 0), "std above 0, got 0 and 0; drop a constant column"),
        (FillNull(math.nan), "value must be a number, got NaN"),
        (Cast(torch.float16), "dtype must be torch.int32, int64, float32 or float64"),
        (Truncate(-1), "length must be an int from 0"),
        (Truncate(1, "top"), r"side must be one of \['left', 'right'\], got 'top'"),
        (Truncate(1, level=3), "level must be 1 or 2, got 3"),
        (Pad(1, math.nan), "value must be a number, got NaN"),
        (ToDense(0), "length must be an int from 1"),
        (TopK(0), "k must be an int from 1"),
        (OneHot(True), "classes must be an int from 1"),
        (Tile(0), "times must be an int from 1"),
        (Cross(limit=0), "limit must be an int from 1"),
        (Vocabulary([]), "at least one entry"),
        (Vocabulary(["a", 1]), "entries must be all strings or all ints, got 1 at 1"),
        (Vocabulary(["a", "b", "a"]), "entries must be distinct, got b'a' twice; drop one"),
        (Vocabulary(["a"], unknown=-1), "unknown must be an int of at least 0"),
    ],
)
def test_errors_of_bad_parameters_name_the_feature(op: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Feature 'price': {type(op).__name__}: .*{message}"):
        Feature("price", ops=[op])


def test_joins_require_several_columns() -> None:
    with pytest.raises(ValueError, match=r"feature 'a': cross joins two or more columns, got one; name several"):
        FeatureEngine([Feature("a", ops=[Cross()])])
    with pytest.raises(ValueError, match=r"\['a_0'\] occur more than once"):
        FeatureEngine([Feature("a", ops=[MultiHash([5, 5])]), Feature("a_0")])
    with pytest.raises(ValueError, match="source must name at least one column, got none"):
        Feature("a", source=[])


def test_a_custom_kernel_must_return_a_column() -> None:
    class Wrong:
        def fault(self) -> None:
            return None

        def kernel(self) -> Any:
            return lambda column: column.values

    with pytest.raises(TypeError, match=r"feature 'a', .* the kernel must return a Column, got Tensor"):
        FeatureEngine([Feature("a", ops=[Wrong()])])({"a": torch.ones(1)})


class Custom:
    """A custom operation with any kernel."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __str__(self) -> str:
        return "own"

    def fault(self) -> None:
        return None

    def kernel(self) -> Any:
        return self._kernel


def _raise(error: Exception) -> Any:
    raise error


@fused_or_not
@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        (lambda c: _raise(ValueError("cannot")), ValueError, "cannot"),
        (lambda c: _raise(TypeError("cannot")), TypeError, "cannot"),
        (lambda c: c.values, TypeError, "the kernel must return a Column, got Tensor"),
        (lambda c: Column(3), TypeError, "values [B, ...], got int"),  # type: ignore[arg-type]
        (lambda c: c._replace(values=c.values.repeat(3), offsets=c.offsets * 3), ValueError, "weights must be [N]"),
        (lambda c: c._replace(offsets=c.offsets.to(torch.int32)), TypeError, "offsets must be int64"),
        (lambda c: c._replace(offsets=c.offsets + 1), ValueError, "offsets must start with 0"),
        (lambda c: c._replace(offsets=None), ValueError, "but no offsets; drop them too"),
    ],
)
def test_errors_of_custom_kernels_name_the_feature(
    fuse: bool, kernel: Any, error: type[Exception], message: str
) -> None:
    column = RaggedTensor.from_lists([[1], [2, 3]], weights=[[1], [1, 1]])
    engine = FeatureEngine([Feature("a", ops=[Custom(kernel), MultiHot(4)])], fuse=fuse)
    with pytest.raises(error, match=f"^feature 'a', own: .*{re.escape(message)}"):
        engine({"a": column})


def test_an_operation_must_be_hashable() -> None:
    class Compared(Custom):
        def __eq__(self, other: object) -> bool:
            return True

    with pytest.raises(
        TypeError, match=r"Feature 'a': ops\[0\] must be hashable, .*got Compared; make it a @dataclass"
    ):
        Feature("a", ops=[Compared(None)])


FLAT_STRINGS = RaggedTensor(torch.zeros(4, 2, dtype=torch.uint8), torch.tensor([0, 2, 4]))
FLOATS = RaggedTensor.from_lists([[1.5], []])
COMPLEX = RaggedTensor(torch.ones(2, dtype=torch.complex64), torch.tensor([0, 2]))
DEEP = RaggedTensor.from_lists([[[[1]]]])


@fused_or_not
@pytest.mark.parametrize(
    ("op", "column", "message"),
    [
        (Hash(), FLAT_STRINGS, "Hash takes strings whose bytes are [N], got values of 2 dimensions"),
        (FillNull(math.inf), ROWS, "a column of torch.int64 cannot hold the value inf"),
        (Pad(2, -math.inf), ROWS, "a column of torch.int64 cannot hold the value -inf"),
        (Pad(2, 1e39), FLOATS, "a column of torch.float32 cannot hold the value 1e+39"),
        (FillNull(-1e39), FLOATS, "a column of torch.float32 cannot hold the value -1e+39"),
        (Truncate(1), COMPLEX, "Truncate takes bool, uint8, int8 to int64 and floats of 16 to 64 bits, got torch.c"),
        (Tile(2), COMPLEX, "Tile takes bool, uint8, int8 to int64 and floats of 16 to 64 bits, got torch.complex64"),
        (Truncate(1), DEEP, "got 3 levels of lists; read the column with fewer levels"),
    ],
)
def test_columns_that_native_code_refuses(fuse: bool, op: Any, column: RaggedTensor, message: str) -> None:
    with pytest.raises(TypeError, match=f"^feature 'a', .*{re.escape(message)}"):
        FeatureEngine([Feature("a", ops=[op])], fuse=fuse)({"a": column})


def test_operations_by_name() -> None:
    assert make_op("truncate", length=3) == Truncate(3)
    assert registered_ops()["cross"] is Cross
    with pytest.raises(ValueError, match="make_op: unknown operation 'hsah'; the registered operations are"):
        make_op("hsah")
    with pytest.raises(TypeError, match=r"'hash' takes no 'knd'; did you mean 'kind'\? Its parameters are \['kind'\]"):
        make_op("hash", knd="farm")
    with pytest.raises(ValueError, match="Cross has that name; choose another"):
        register_op("cross")(Truncate)
    with pytest.raises(TypeError, match=r"Lacks must have a method fault\(\)"):
        register_op("lacks")(type("Lacks", (), {}))
    methods = {"fault": lambda self: None, "kernel": lambda self: None}
    with pytest.raises(TypeError, match="must compare by its parameters and be hashable"):
        register_op("same")(type("Same", (), methods))


def test_columns_keep_their_form() -> None:
    assert Column.of(NESTED).pack().outer == NESTED.outer  # type: ignore[union-attr]


@on_accelerators
@fused_or_not
def test_bad_offsets_of_strings_on_an_accelerator_are_found_by_check(device: str, fuse: bool) -> None:
    engine = FeatureEngine([Feature("word", ops=[Hash()])], fuse=fuse)
    words = RaggedTensor.from_strings(["ab", "c", "def"]).to(device)
    expected = engine({"word": words})["word"]
    engine.check()
    bad = RaggedTensor.unchecked(words.values, words.offsets.clone())
    bad.offsets[2] = -5
    engine({"word": bad})
    with pytest.raises(ValueError, match="offsets"):
        engine.check()
    # The accelerator works as before.
    assert torch.equal(engine({"word": words})["word"].cpu(), expected.cpu())
    engine.check()


@on_accelerators
@fused_or_not
def test_strings_that_were_cut_off_on_an_accelerator_are_not_refused(device: str, fuse: bool) -> None:
    words = RaggedTensor.from_strings([["ab", "c", "def"], ["g"] * 9, []])
    engine = FeatureEngine([Feature("word", ops=[Truncate(1), Hash()])], fuse=fuse)
    hashes = engine({"word": words.to(device)})["word"]
    engine.check()
    assert hashes.offsets.tolist() == [0, 1, 2, 2]
    assert hashes.values[:2].tolist() == engine({"word": words})["word"].values.tolist()


HUGE = torch.tensor([0.5, 1e19])
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "bucketize": (Bucketize([0]), NAN, "NaN"),
    "bucketize, float64": (Bucketize([0]), NAN.double(), "NaN"),
    "cast": (Cast(torch.int64), NAN, "NaN or outside the range of int64"),
    "cast to int32": (Cast(torch.int32), HUGE.double(), "NaN or outside the range of int64"),
    "clip": (Clip(0, 1), NAN, "NaN"),
    "hash": (Hash(), RaggedTensor.unchecked(WORDS.values, torch.tensor([0, 2, 1])), "offsets"),
    "log": (Log(), torch.tensor([1.0, 0.0]), "no logarithm"),
    "normalize": (Normalize(0, 1), NAN, "NaN"),
    "string_multi_hash": (StringMultiHash(), RaggedTensor.unchecked(WORDS.values, torch.tensor([0, 2, 1])), "offsets"),
    "vocabulary": (Vocabulary([1]), torch.tensor([1, 2]), "not in the vocabulary"),
    "vocabulary of strings": (Vocabulary(["a"]), WORDS, "not in the vocabulary"),
}
"""Element-wise operations, and a column that each refuses on every device."""

RESULT_FOR_ALL = {"age", "date_part", "decimal_string", "mask", "mod", "multi_hash"}
"""Operations that have a result for every value."""
ROWS_CHANGED = {"concat", "cross", "distinct", "fill_null", "length", "multi_hot", "one_hot", "pad", "tile", "to_dense"}
ROWS_CHANGED |= {"top_k", "truncate"}
"""Operations that change rows, and record nothing on an accelerator; see FeatureEngine.check."""


ON_THE_HOST = {"tokenize"}
"""Operations that run on the host and raise there, whatever the device."""


def test_every_operation_is_classified() -> None:
    refused = {case.partition(",")[0].partition(" ")[0] for case in REFUSED}
    classified = refused | RESULT_FOR_ALL | ROWS_CHANGED | ON_THE_HOST
    assert classified == set(registered_ops()), (
        "put a new operation into one of these groups, with a case if it refuses"
    )


@on_accelerators
@fused_or_not
@pytest.mark.parametrize("case", REFUSED)
def test_values_that_the_cpu_refuses_are_found_by_check_on_an_accelerator(device: str, fuse: bool, case: str) -> None:
    op, column, message = REFUSED[case]
    engine = FeatureEngine([Feature("a", ops=[op])], fuse=fuse)

    def on_accelerator() -> None:
        engine({"a": column.to(device)})
        engine.check()

    errors = []
    for call in (lambda: engine({"a": column}), on_accelerator):
        with pytest.raises(ValueError, match=message) as error:
            call()
        errors.append(str(error.value))
    if fuse and "hash" not in case:  # on the CPU, offsets are checked before an operation runs
        assert errors[0] == errors[1]
    engine({"a": column[:1].to(device)})
    engine.check()


@on_accelerators
@fused_or_not
@pytest.mark.parametrize("op", [Bucketize([0]), Cast(torch.int64), Clip(0, 1), Log(), Normalize(0, 1)])
def test_values_that_were_cut_off_on_an_accelerator_are_not_refused(device: str, fuse: bool, op: Any) -> None:
    rows = RaggedTensor.from_lists([[0.5, math.nan], [2.0, math.nan, math.nan], []])
    engine = FeatureEngine([Feature("a", ops=[Truncate(1), op])], fuse=fuse)
    found = engine({"a": rows.to(device)})["a"]
    engine.check()
    assert found.values[:2].tolist() == pytest.approx(engine({"a": rows})["a"].values.tolist(), rel=1e-6)
