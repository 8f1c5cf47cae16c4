"""Weights that come as bodies: whole or in parts, and what is left of those that do not come whole."""

import os
import socket

import jax
import numpy as np
from safetensors.numpy import save
from serving import ADMIN, KEY, running
from test_control import ok

from checkpoints.safetensors_files import open_folder
from jaxengine.models import loading


def tensors_of(llm, params, folder) -> dict[str, np.ndarray]:
    """The weights under Hugging Face's names."""
    loading.save(folder, llm.config, params)
    with open_folder(folder) as tensors:
        return {name: tensors.read(name) for name in tensors.names}


BINARY = {"Content-Type": "application/octet-stream"}


def test_weights_as_bodies_are_taken_whole_or_not_at_all(learner, tmp_path):
    llm, admin = learner.llm, learner.admin
    tensors = tensors_of(llm, jax.tree.map(lambda leaf: leaf * 2, llm.params), tmp_path / "new")
    whole, names = save(tensors), sorted(tensors)
    expected = llm.params
    wrong = {
        "no file": b"weights",
        "a file that is cut": whole[: len(whole) // 2],
        "a name too few": save({name: tensors[name] for name in names[1:]}),
        "a name too many": save(tensors | {"other": tensors[names[0]]}),
    }
    for body in wrong.values():
        response = admin.post("/update_weights", content=body, headers=BINARY)
        assert (response.status_code, llm.weights_version) == (400, 0), response.text
        assert str(tmp_path) not in response.text and not os.listdir(tmp_path / "root")
    too_long = admin.post("/update_weights", content=bytes(3 * len(whole)), headers=BINARY)
    assert (too_long.status_code, llm.params, os.listdir(tmp_path / "root")) == (413, expected, [])
    assert learner.user.post("/update_weights", content=whole, headers=BINARY).status_code == 401

    answer = ok(admin.post("/update_weights?weight_version=one", content=whole, headers=BINARY))
    assert answer["version"] == llm.weights_version == 1
    assert ok(admin.post("/init_weight_transfer_engine", json={"init_info": {"backend": "http"}}))["message"]
    ok(admin.post("/start_weight_update", json={}))
    for part in (names[:3], names[3:]):
        ok(admin.post("/update_weights", content=save({name: tensors[name] for name in part}), headers=BINARY))
        assert llm.weights_version == 1
    ok(admin.post("/finish_weight_update", json={"weight_version": "two"}))
    info = ok(learner.user.get("/weight_info"))
    assert (info["weight_version"], info["version"], os.listdir(tmp_path / "root")) == ("two", 2, [])
    doubled = jax.tree.map(lambda leaf: leaf * 2, expected)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), llm.params, doubled)))


def test_a_part_that_is_wrong_leaves_the_old_weights(learner, tmp_path):
    tensors = tensors_of(learner.llm, learner.llm.params, tmp_path / "new")
    name = min(tensors)
    ok(learner.admin.post("/start_weight_update", json={}))
    ok(learner.admin.post("/update_weights", content=save({name: tensors[name]}), headers=BINARY))
    response = learner.admin.post("/finish_weight_update", json={})
    assert (response.status_code, learner.llm.weights_version, os.listdir(tmp_path / "root")) == (400, 0, [])


def files_in(root) -> list[str]:
    return [name for _, _, names in os.walk(root) for name in names]


def half_sent(learner, body: bytes, root) -> socket.socket:
    """The connection of a client that sent half of a body, which the server is reading."""
    count = len(files_in(root))
    host, port = learner.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = (
        f"POST /update_weights HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {ADMIN}\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body[: len(body) // 2])
    learner.wait_until(lambda: len(files_in(root)) > count)
    return connection


def test_a_client_that_leaves_within_a_body_leaves_nothing(learner, tmp_path):
    root, tensors = tmp_path / "root", tensors_of(learner.llm, learner.llm.params, tmp_path / "new")
    whole, names = save(tensors), sorted(tensors)
    half_sent(learner, whole, root).close()
    learner.wait_until(lambda: not os.listdir(root))
    assert ok(learner.admin.post("/update_weights", content=whole, headers=BINARY))["version"] == 1

    first, second = (save({name: tensors[name] for name in part}) for part in (names[:3], names[3:]))
    ok(learner.admin.post("/start_weight_update", json={}))
    ok(learner.admin.post("/update_weights", content=first, headers=BINARY))
    half_sent(learner, second, root).close()
    learner.wait_until(lambda: len(files_in(root)) == 1)  # that part is sent again
    ok(learner.admin.post("/update_weights", content=second, headers=BINARY))
    assert ok(learner.admin.post("/finish_weight_update", json={}))["version"] == 2


def test_while_a_body_comes_nothing_else_touches_the_update(learner, tmp_path):
    root, whole = tmp_path / "root", save(tensors_of(learner.llm, learner.llm.params, tmp_path / "new"))
    with half_sent(learner, whole, root) as connection:
        refused = [
            learner.admin.post("/update_weights", content=whole, headers=BINARY),
            learner.admin.post("/start_weight_update", json={}),
            learner.admin.post("/finish_weight_update", json={}),
        ]
        assert [response.status_code for response in refused] == [409] * 3 and len(files_in(root)) == 1
        connection.sendall(whole[len(whole) // 2 :])
        assert connection.recv(12) == b"HTTP/1.1 200" and learner.llm.weights_version == 1


def test_weights_that_were_dropped_are_uploaded_again(learner, tmp_path):
    tensors = tensors_of(learner.llm, learner.llm.params, tmp_path / "new")
    whole = save(tensors)
    assert len(whole) > 2**20
    ok(learner.admin.post("/sleep?level=2"))
    assert ok(learner.admin.post("/update_weights", content=whole, headers=BINARY))["version"] == 1
    ok(learner.admin.post("/wake_up"))
    assert ok(learner.user.post("/v1/completions", json={"prompt": "1+", "max_tokens": 1}))["choices"]


def test_a_body_of_another_dtype_is_refused_by_the_tensor_s_name(learner):
    body = save({"model.norm.weight": np.zeros(4, np.int64)})
    response = learner.admin.post("/update_weights", content=body, headers=BINARY)
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and message.startswith("body 1: tensor 'model.norm.weight' has dtype 'I64'")


def test_a_server_that_ends_drops_an_unfinished_update(calc, tmp_path):
    with running(calc, api_key=KEY, admin_key=ADMIN, weights_root=tmp_path) as served:
        ok(served.admin.post("/start_weight_update", json={}))
        ok(served.admin.post("/update_weights", content=save({"a": np.zeros(4)}), headers=BINARY))
        assert len(files_in(tmp_path)) == 1
    assert not os.listdir(tmp_path)


def test_a_disk_that_takes_no_body_is_no_fault_of_the_client_s(learner, tmp_path):
    (tmp_path / "root").rmdir()
    response = learner.admin.post("/update_weights", content=b"weights", headers=BINARY)
    assert response.status_code == 500 and str(tmp_path) not in response.text
