"""Control and weight routes: they stop and change the engine, and no token is lost unless that is asked for."""

import concurrent.futures
import os
import re

import jax
import numpy as np
import pytest

from jaxengine import SamplingParams
from jaxengine.models import loading

BODY = dict(prompt="1+", max_tokens=40, ignore_eos=True, seed=1, return_token_ids=True)
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, seed=1)


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(4) as found:
        yield found


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def begin(served, pool, **changes):
    """A completion that is under way."""
    future = pool.submit(lambda: ok(served.user.post("/v1/completions", json=BODY | changes)))
    served.wait_until(lambda: served.llm.engine.requests or future.done())
    return future


def token_ids(answer) -> list[int]:
    return answer["choices"][0]["token_ids"]


def num_drawn(served) -> int:
    """Tokens of the one request that is under way."""
    (request,) = served.llm.engine.requests.values()
    return len(request.samples[0].drawn.token_ids)


def test_pause_keeps_and_resume_goes_on_with_the_same_bits(served, pool):
    future = begin(served, pool, max_tokens=480)
    served.wait_until(lambda: num_drawn(served) > 0)
    assert ok(served.admin.post("/pause?mode=keep&clear_cache=false")) == {"status": "paused"}
    count = num_drawn(served)
    for mode in ("keep", "wait"):  # idempotent
        assert ok(served.admin.post(f"/pause?mode={mode}")) == {"status": "paused"}
    assert ok(served.user.get("/is_paused")) == {"is_paused": True} and num_drawn(served) == count < 480
    assert 'vllm:engine_pause_state{model_name="calc"} 1.0' in served.user.get("/metrics").text
    assert ok(served.admin.post("/resume")) == {"status": "resumed"}
    assert ok(served.user.get("/is_paused")) == {"is_paused": False}
    whole = served.llm.generate(["1+"], PARAMS.replace(max_tokens=480))[0].outputs[0]
    assert token_ids(future.result()) == whole.token_ids


def test_pause_aborts(served, pool):
    future = begin(served, pool, max_tokens=480)
    ok(served.admin.post("/pause"))
    assert future.result()["choices"][0]["finish_reason"] == "abort"
    ok(served.admin.post("/resume"))


def test_pause_waits_for_the_end(served, pool):
    future = begin(served, pool)
    ok(served.admin.post("/pause?mode=wait"))
    assert future.result()["choices"][0]["finish_reason"] == "length" and served.is_idle()
    later = begin(served, pool)
    ok(served.admin.post("/reset_prefix_cache"))  # between two steps, of which there is none
    assert num_drawn(served) == 0
    ok(served.admin.post("/resume"))
    assert token_ids(later.result()) == token_ids(future.result())


def test_requests_are_aborted_by_the_id_of_their_answer(served, pool):
    ok(served.admin.post("/pause?mode=keep"))
    one = begin(served, pool, request_id="one")
    two = begin(served, pool, request_id="two", prompt=["1+", "2+"])
    served.wait_until(lambda: len(served.llm.engine.requests) == 3)
    assert ok(served.admin.post("/abort_requests", json={"request_ids": ["two", "no such"]}))["aborted"] == 2
    assert [choice["finish_reason"] for choice in two.result()["choices"]] == ["abort", "abort"]
    ok(served.admin.post("/resume"))
    assert one.result()["choices"][0]["finish_reason"] == "length"
    assert ok(served.admin.post("/abort_requests"))["aborted"] == 0


def test_the_prefix_cache_is_emptied(served):
    body = BODY | dict(prompt="1+2+3+4+5+6+7+8+9+1+2+3+4+5+6+7+8+9+1+2+3+4+5+6+7+8+9+", max_tokens=1)
    cached = []
    for _ in range(2):
        ok(served.user.post("/v1/completions", json=body))
        usage = ok(served.user.post("/v1/completions", json=body))["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert ok(served.admin.post("/reset_prefix_cache")) == {"success": True}
    first = ok(served.user.post("/v1/completions", json=body))["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == [32, 32] and first == 0


def test_sleep_gives_the_pool_back_and_wake_up_goes_on(served, pool):
    expected = served.llm.generate(["1+"], PARAMS)[0].outputs[0].token_ids
    ok(served.admin.post("/sleep?level=1"))
    assert ok(served.user.get("/is_sleeping")) == {"is_sleeping": True} and not served.llm.engine.has_pool
    assert served.user.post("/v1/completions", json=BODY).status_code == 503
    ok(served.admin.post("/wake_up?tags=weights"))
    assert ok(served.user.get("/is_sleeping")) == {"is_sleeping": True}
    ok(served.admin.post("/wake_up?tags=kv_cache"))
    assert ok(served.user.get("/is_sleeping")) == {"is_sleeping": False}
    assert token_ids(ok(served.user.post("/v1/completions", json=BODY))) == expected


def test_what_trainers_ask_first(served):
    assert ok(served.user.get("/get_world_size")) == {"world_size": 1}
    info = ok(served.user.get("/server_info?config_format=json"))
    assert info["vllm_config"]["model_config"]["dtype"] == "torch.bfloat16"
    assert info["vllm_config"]["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert info["digest"] == served.llm.contract().digest


def test_weights_outside_the_root_are_not_read(learner, tmp_path):
    """They would fit: what refuses them is where they lie."""
    root = tmp_path / "root"
    loading.save(tmp_path / "outside", learner.llm.config, learner.llm.params)
    (root / "link").symlink_to(tmp_path / "outside")
    climbing = os.path.relpath(tmp_path / "outside", root)
    for folder in (str(tmp_path / "outside"), climbing, "link"):
        response = learner.admin.post("/update_weights", json={"weight_dir": folder})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "outside_root")
    assert learner.llm.weights_version == 0


def test_weights_from_a_folder_are_taken_whole_or_not_at_all(learner, tmp_path):
    llm, root = learner.llm, tmp_path / "root"
    changed = jax.tree.map(lambda leaf: leaf * 2, llm.params)
    loading.save(root / "step-1", llm.config, changed)
    (root / "broken").mkdir()
    assert ok(learner.user.get("/weight_info"))["weight_version"] == "default"
    for folder in ("broken", "no such"):
        response = learner.admin.post("/update_weights", json={"weight_dir": folder})
        assert (response.status_code, llm.weights_version) == (400, 0), response.text
        assert str(root) not in response.text
    assert ok(learner.admin.post("/init_weight_transfer_engine", json={"init_info": {"backend": "disk"}}))["message"]
    assert ok(learner.admin.post("/start_weight_update", json={}))["message"]
    answer = ok(learner.admin.post("/update_weights", json={"update_info": {"path": str(root / "step-1")}}))
    assert answer["version"] == llm.weights_version == 1
    ok(learner.admin.post("/finish_weight_update", json={"weight_version": "step 1"}))
    info = ok(learner.user.get("/weight_info"))
    assert (info["weight_version"], info["version"]) == ("step 1", 1)
    (choice,) = ok(learner.user.post("/v1/completions", json=BODY))["choices"]
    assert choice["weight_versions"] == [{"version": 1, "start": 0, "stop": 40}]
    assert choice["token_ids"] == llm.generate(["1+"], PARAMS)[0].outputs[0].token_ids


# -- SGLang's ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, matched", [(3, "5"), (4, 258)])
def test_sglang_generates_with_the_bits_of_generate(served, seed, matched):
    ids = served.llm.tokenizer.encode("12+30=")
    sampling = {
        "max_new_tokens": 12,
        "temperature": 0.8,
        "top_k": -1,
        "sampling_seed": seed,
        "skip_special_tokens": False,
    }
    sampling |= {"spaces_between_special_tokens": False, "no_stop_trim": True, "stop": ["5"], "stop_token_ids": [258]}
    body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
    answer = ok(served.user.post("/generate", json=body))
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=seed, skip_special_tokens=False, stop=["5"])
    params = params.replace(include_stop_str_in_output=True, stop_token_ids=[258])
    (sample,) = served.llm.generate([ids], params)[0].outputs
    told = answer["meta_info"]
    logprobs, tokens, _ = zip(*told["output_token_logprobs"], strict=True)
    assert (answer["text"], list(tokens)) == (sample.text, sample.token_ids)
    assert np.asarray(logprobs, np.float32).tobytes() == sample.token_logprobs.tobytes()
    assert told["finish_reason"] == {"type": "stop", "matched": matched}
    assert told["completion_tokens"] == len(sample.token_ids)
    assert (told["prompt_tokens"], told["weight_version"]) == (len(ids), "0")


def test_sglang_batches_are_lists(served):
    body = {"text": ["1+1=", "2+2="], "sampling_params": {"n": 2, "max_new_tokens": 3, "sampling_seed": 1}}
    answers = ok(served.user.post("/generate", json=body))
    outputs = served.llm.generate(body["text"], SamplingParams(n=2, max_tokens=3, seed=1))
    assert [answer["text"] for answer in answers] == [sample.text for output in outputs for sample in output.outputs]
    greedy = {"max_new_tokens": 1, "temperature": 0}
    single = ok(served.user.post("/generate", json=body | {"text": "1+1=", "sampling_params": greedy}))
    assert single["meta_info"]["finish_reason"] == {"type": "length", "length": 1}
    nothing = {"text": []}, {"text": None, "input_ids": []}
    for wrong in (
        {"text": None}, {"input_ids": [1]}, {"stream": True}, {"sampling_params": {"max_tokens": 1}}, *nothing
    ):  # fmt: skip
        assert served.user.post("/generate", json={"text": "1"} | wrong).status_code == 400


def test_sglang_grammars_are_ebnf(served):
    """In the form of llama.cpp, whose rules are `name ::= …`, unlike those of `structured_outputs`."""
    pytest.importorskip("llguidance")
    body = {"text": "1+1=", "sampling_params": {"ebnf": 'root ::= digit digit "."\ndigit ::= [0-9]'}}
    assert re.fullmatch(r"[0-9]{2}\.", ok(served.user.post("/generate", json=body))["text"])
    for wrong in ("root ::= other", "(" * 5000, "1" * 70_000):
        response = served.user.post("/generate", json=body | {"sampling_params": {"ebnf": wrong}})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "ebnf"), response.text


def test_sglang_takes_weights_from_disk(learner, tmp_path):
    loading.save(tmp_path / "root" / "new", learner.llm.config, jax.tree.map(lambda leaf: leaf * 2, learner.llm.params))
    body = {"model_path": str(tmp_path / "root" / "new"), "load_format": "auto", "weight_version": "new"}
    assert learner.user.post("/update_weights_from_disk", json=body).status_code == 401
    assert ok(learner.admin.post("/update_weights_from_disk", json=body))["success"]
    assert learner.llm.weights_version == 1 and learner.user.get("/weight_info").json()["weight_version"] == "new"
    outside = learner.admin.post("/update_weights_from_disk", json={"model_path": "/etc"})
    assert (outside.status_code, outside.json()["error"]["code"]) == (400, "outside_root")


def test_nccl_is_501_with_what_to_do(served):
    info = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "packed": True}
    response = served.admin.post("/init_weight_transfer_engine", json={"init_info": info})
    assert response.status_code == 501 and "weight_dir" in response.json()["detail"]
