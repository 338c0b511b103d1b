"""The routes of the Open Inference Protocol, by Triton's client and by plain requests."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tritonclient.utils import InferenceServerException

from recis_hybrid.serving.server import Server
from tests.serving.server.servers import GOOD, SCORES, connect, predict, request, running
from tests.serving.server.stand_in import write_model

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")

MODEL = "/v2/models/shop"
INFER = f"{MODEL}/infer"
TENSORS: dict[str, tuple[str, npt.NDArray[Any]]] = {
    "user": ("INT64", np.array([1, 2])),
    "items": ("INT64", np.array([1, 2])),
    "items.lengths": ("INT64", np.array([2, 0])),
    "text": ("BYTES", np.array(["ab", "c"], dtype=object)),
    "price": ("FP32", np.array([[1, 2], [3, 4]], np.float32)),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served") / "shop"
    write_model(folder, 7, 1.0)
    with running(folder, max_request_bytes=2**20) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def inputs(is_binary: bool = True, **changes: Any) -> list[Any]:
    found = []
    for name, (datatype, values) in {**TENSORS, **changes}.items():
        tensor = triton.InferInput(name, values.shape, datatype)
        tensor.set_data_from_numpy(values, binary_data=is_binary)
        found.append(tensor)
    return found


def json_request(**changes: dict[str, Any] | None) -> dict[str, Any]:
    """Return a request in JSON; each change updates one input, and None removes it."""
    tensors = {
        name: {"name": name, "datatype": datatype, "shape": list(values.shape), "data": values.tolist()}
        for name, (datatype, values) in TENSORS.items()
    }
    for name, change in changes.items():
        key = name.replace("__", ".")
        if change is None:
            del tensors[key]
        else:
            tensors[key] = {**tensors.get(key, {"name": key}), **change}
    return {"inputs": list(tensors.values())}


def error(server: Server, body: Any, headers: dict[str, str] | None = None, status: int = 400) -> str:
    found, answer, _ = request(server, INFER, body, headers)
    assert found == status, answer
    assert list(answer) == ["error"]
    assert predict(server)[0] == 200
    return str(answer["error"])


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("is_binary", [True, False])
def test_tritons_client_gets_scores(client: Any, is_binary: bool, compression: str | None) -> None:
    outputs = [triton.InferRequestedOutput(name, binary_data=is_binary) for name in SCORES]
    result = client.infer(
        "shop",
        inputs(is_binary),
        model_version="7",
        outputs=outputs,
        request_id="a1",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
        timeout=1000,
    )
    assert {name: result.as_numpy(name).tolist() for name in SCORES} == SCORES
    assert result.get_response()["id"] == "a1"
    assert result.get_response()["model_version"] == "7"
    assert result.get_output("pair")["datatype"] == "FP32"
    # Without a choice the client asks for all outputs in binary form.
    everything = client.infer("shop", inputs(is_binary))
    assert {name: everything.as_numpy(name).tolist() for name in SCORES} == SCORES


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_large_answers_are_compressed_if_the_client_accepts_it(server: Server, client: Any, compression: str) -> None:
    rows = 5000
    many = {
        **{"user": ("INT64", 100 + np.arange(rows)), "items": ("INT64", np.zeros(0, np.int64))},
        **{"items.lengths": ("INT64", np.zeros(rows, np.int64)), "text": ("BYTES", np.full(rows, b"", dtype=object))},
        "price": ("FP32", np.ones((rows, 2), np.float32)),
    }
    result = client.infer("shop", inputs(**many), response_compression_algorithm=compression)
    assert result.as_numpy("score").tolist() == list(range(100, 100 + rows))
    columns = {"user": [1] * 3000, "items": [[]] * 3000, "text": [""] * 3000, "price": [[1, 2]] * 3000}
    with contextlib.closing(connect(server)) as connection:
        body = json.dumps({"columns": columns})
        connection.request("POST", "/predict", body, {"Accept-Encoding": f"br;q=1, {compression};q=0.5"})
        answer = connection.getresponse()
        assert answer.headers["content-encoding"] == compression
        text = answer.read()
    unpacked = gzip.decompress(text) if compression == "gzip" else zlib.decompress(text)
    assert json.loads(unpacked)["outputs"]["score"] == [1.0] * 3000


def test_tritons_client_sees_the_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("shop")
    assert client.is_model_ready("shop", "7")
    assert not client.is_model_ready("shop", "8")
    assert not client.is_model_ready("shoe")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("shop")
    assert metadata["versions"] == ["7"]
    assert {each["name"]: (each["datatype"], each["shape"]) for each in metadata["inputs"]} == {
        "user": ("INT64", [-1]),
        "items": ("INT64", [-1]),
        "items.lengths": ("INT64", [-1]),
        "text": ("BYTES", [-1]),
        "price": ("FP32", [-1, 2]),
    }
    assert metadata["outputs"] == [
        {"name": "score", "datatype": "FP32", "shape": [-1]},
        {"name": "pair", "datatype": "FP32", "shape": [-1, 2]},
    ]


def test_flat_and_nested_json_and_the_choice_of_outputs(server: Server) -> None:
    for price in ([[1, 2], [3, 4]], [1, 2, 3, 4], [1.0, 2, 3, 4]):
        body = json_request(price={"data": price})
        status, answer, _ = request(server, INFER, {**body, "id": "x", "outputs": [{"name": "pair"}]})
        assert (status, answer["id"]) == (200, "x")
        assert answer["outputs"] == [{"name": "pair", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]
    # One row of k values as a list of lists needs no lengths.
    status, answer, _ = request(
        server, INFER, json_request(items={"shape": [2, 2], "data": [[1, 2], [3, 4]]}, items__lengths=None)
    )
    assert (status, answer["outputs"][0]["data"]) == (200, [1 + 3 + 2, 2 + 7 + 1])
    # A null takes the default of its column.
    status, answer, _ = request(server, INFER, json_request(text={"data": ["abcd", None]}))
    assert (status, answer["outputs"][0]["data"]) == (200, [1 + 3 + 4, 2])


def test_numbers_beyond_float32_are_infinite(server: Server) -> None:
    status, answer = predict(server, price=[[1e300, -1e300], [1, 2]])
    # JSON has no infinities.
    assert (status, answer["outputs"]["pair"]) == (200, [[None, None], [1, 2]])


def test_an_empty_batch_is_refused(server: Server, client: Any) -> None:
    empty = {name: (datatype, values[:0]) for name, (datatype, values) in TENSORS.items()}
    with pytest.raises(InferenceServerException, match="the request has no rows; send at least one element"):
        client.infer("shop", inputs(**empty))
    status, answer = predict(server, user=[], items=[], text=[], price=[])
    assert (status, answer["error"]) == (400, "the request has no rows; send at least one element in every column")


def test_ids_of_64_bits_are_exact(server: Server) -> None:
    status, answer = predict(server, user=[2**53 + 1, 0], items=[[-(2**53)], []], text=["", ""])
    assert (status, answer["outputs"]["score"]) == (200, [1.0, 0.0])
    body = json_request(user={"data": [2**53 + 1, 0]}, items={"data": [-(2**53), 0]}, text={"data": ["", ""]})
    status, answer, _ = request(server, INFER, body)
    assert (status, answer["outputs"][0]["data"]) == (200, [1.0, 0.0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"user": None}, "'user' is missing"),
        ({"users": {"datatype": "INT64", "shape": [2], "data": [1, 2]}}, "there is no column 'users'"),
        ({"user": {"datatype": "INT"}}, "input 'user': 'datatype' must be one of INT8"),
        ({"user": {"datatype": []}}, "BYTES, got a list of 0"),
        ({"user": {"data": [1.5, 2]}}, "input 'user': 'data' must consist of integers for INT64, got 1.5"),
        ({"user": {"data": ["1", "2"]}}, "input 'user': 'data' must consist of integers for INT64, got '1'"),
        ({"user": {"data": [True, False]}}, "integers for INT64, got True"),
        ({"user": {"data": [2**63, 1]}}, "input 'user': INT64 cannot hold a value"),
        ({"user": {"data": [10**30, 1]}}, "integers for INT64, got 1e+30"),
        ({"user": {"datatype": "FP32", "data": [1.5, 2]}}, "'user': row 0: must be an integer, got 1.5"),
        ({"user": {"data": [1, None]}}, "'user': row 1 has a null"),
        ({"user": {"data": [1, 2, 3]}}, "input 'user': the shape [2] needs 2 values, 'data' has 3"),
        ({"user": {"data": 1}}, "input 'user': 'data' must be a list, got 1"),
        ({"user": {"shape": [-2]}}, "input 'user': 'shape' must be a list of sizes"),
        ({"user": {"shape": []}}, "input 'user': 'shape' must be a list of sizes"),
        ({"user": {"shape": [2, 1]}}, "'user': takes one int64 for each row, got an array [2, 1]"),
        ({"user": {"shape": [3], "data": [1, 2, 3]}}, "unequal numbers of rows"),
        ({"user": {"parameters": {"shared_memory_region": "x"}}}, "shared memory is not supported"),
        ({"user": {"parameters": []}}, "input 'user': 'parameters' must be an object"),
        ({"user": {"parameters": {"binary_data_size": 16}}}, "must not have both 'data' and 'binary_data_size'"),
        ({"price": {"data": [[1, 2], [3]]}}, "the lists of 'data' must be of the shape [2, 2]"),
        ({"price": {"data": [[1, 2], 3]}}, "the lists of 'data' must be of the shape [2, 2]"),
        ({"price": {"shape": [4], "data": [1, 2, 3, 4]}}, "'price': takes a list of 2 float32"),
        ({"items__lengths": None}, "there must be an input 'items.lengths'"),
        ({"items": None}, "input 'items.lengths': there is no input 'items' with the values"),
        ({"items__lengths": {"data": [2, 2]}}, "'items': the lengths add up to 4, but there are 2 values"),
        ({"items__lengths": {"data": [3, -1]}}, "'items': lengths must be 0 to 2"),
        ({"items__weights": {"datatype": "FP32", "shape": [2], "data": [1, 2]}}, "takes lists without weights"),
        ({"text": {"data": ["ab", 3]}}, "input 'text': 'data' must consist of strings for BYTES, got 3"),
    ],
)
def test_a_bad_input_is_named(server: Server, changes: dict[str, Any], said: str) -> None:
    assert said in error(server, json_request(**changes))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is not valid JSON"),
        (b"{", "the body is not valid JSON"),
        (b"[1]", "the body must be a JSON object, got a list of 1"),
        (b"[" * 100_000, "the body is not valid JSON"),
        (b'{"inputs": ' + b"[" * 1000 + b"]" * 1000 + b"}", "an input must be an object with a 'name'"),
        (b'{"inputs": [{"name": "user", "shape": [1], "datatype": "FP32", "data": [NaN]}]}', "is not valid JSON"),
        (b'{"id": "\xff"}', "the body is not valid JSON"),
        ({}, "'inputs' must be a list of tensors, got null"),
        ({"inputs": []}, "'inputs' must be a list of tensors"),
        ({"inputs": [3]}, "an input must be an object with a 'name', got 3"),
        ({**json_request(), "id": 3}, "'id' must be a string, got 3"),
        ({**json_request(), "parameters": 3}, "the request: 'parameters' must be an object"),
        ({**json_request(), "parameters": {"binary_data_output": 1}}, "must be true or false, got 1"),
        ({**json_request(), "outputs": [{"name": "sc"}]}, "there is no output 'sc'; there are 'score', 'pair'"),
        ({**json_request(), "outputs": ["score"]}, "an output must be an object with a 'name'"),
        ({**json_request(), "outputs": [{"name": "pair"}] * 2}, "an output is requested twice"),
        (
            {**json_request(), "outputs": [{"name": "pair", "parameters": {"classification": 3}}]},
            "the parameter 'classification' is not supported",
        ),
        ({"inputs": [*json_request()["inputs"], *json_request()["inputs"]]}, "input 'user' occurs twice"),
    ],
)
def test_a_malformed_request_is_explained(server: Server, body: Any, said: str) -> None:
    assert said in error(server, body)


def binary_request(
    size: int | None = None, length: int | None = None, tail: bytes = b""
) -> tuple[bytes, dict[str, str]]:
    raw = np.array([1, 2]).tobytes() + tail
    body = json_request(user={"parameters": {"binary_data_size": len(raw) if size is None else size}})
    del body["inputs"][0]["data"]
    text = json.dumps(body).encode()
    return text + raw, {"Inference-Header-Content-Length": str(len(text) if length is None else length)}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (binary_request(length=10**9), "Inference-Header-Content-Length must be a number of bytes up to"),
        (binary_request(length=-1), "Inference-Header-Content-Length must be a number of bytes up to"),
        (binary_request(length=10), "the body is not valid JSON"),
        (binary_request(size=17), "'binary_data_size' must be a number of bytes up to 16, which is what is left"),
        (binary_request(size=-1), "'binary_data_size' must be a number of bytes up to 16"),
        (binary_request(size=8), "the shape [2] of INT64 needs 16 bytes, 'binary_data_size' is 8"),
        (binary_request(size=16, tail=b"123"), "3 bytes follow the last tensor"),
    ],
)
def test_wrong_binary_sizes_are_explained(server: Server, request_: tuple[bytes, dict[str, str]], said: str) -> None:
    assert said in error(server, *request_)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\x02\0\0\0ab", "the shape [2] needs 2 strings, there are 1"),
        (b"\x02\0\0\0ab\x05\0\0\0c", "string 1 is truncated"),
        (b"\x02\0\0\0ab\x05\0", "string 1 is truncated"),
        (b"\x02\0\0\0\xff\xff\x00\0\0\0", "string 0 is not UTF-8"),
    ],
)
def test_malformed_binary_strings_are_explained(server: Server, raw: bytes, said: str) -> None:
    body = json_request(text={"parameters": {"binary_data_size": len(raw)}})
    del next(tensor for tensor in body["inputs"] if tensor["name"] == "text")["data"]
    text = json.dumps(body).encode()
    assert f"input 'text': {said}" in error(server, text + raw, {"Inference-Header-Content-Length": str(len(text))})


def test_unknown_routes_and_models(server: Server) -> None:
    assert request(server, "/v3")[:2] == (404, {"error": "there is no route '/v3'; see /v2."})
    assert request(server, INFER)[0] == 405
    status, answer, _ = request(server, "/v2/models/shoe/infer", json_request())
    assert (status, answer["error"]) == (404, "there is no model 'shoe'; this server has 'shop'.")
    status, answer, _ = request(server, f"{MODEL}/versions/8/infer", json_request())
    assert (status, answer["error"]) == (404, "model 'shop': version '8' is not loaded; 7 is.")


def test_predict_takes_columns(server: Server) -> None:
    assert predict(server) == (200, {"step": 7, "outputs": SCORES})
    status, answer = predict(server, user=[12, 2])
    assert (status, answer["outputs"]["score"]) == (200, [12 + 3 + 2, 3])
    for bad in (["12", 2], [[1], [2]]):
        status, answer = predict(server, user=bad)
        assert status == 400
        assert "column 'user'" in answer["error"]
    for body in ({}, {"columns": []}, {"columns": GOOD, "rows": []}):
        assert request(server, "/predict", body)[0] == 400


def test_a_fault_of_the_model_is_an_internal_error(server: Server) -> None:
    status, answer = predict(server, user=[13, 1])
    assert (status, answer) == (500, {"error": "internal error; the server's log has the details."})
    assert predict(server)[0] == 200
