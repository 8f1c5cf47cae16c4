"""What each client knows to ask for and may not do here: what it gets, and what to use; and the table of it in
jaxengine/server/README.md.

`python tests/server/not_here.py` writes it anew.
"""

from attacks import CHAT, COMPLETE, GENERATE, MESSAGES, README, SGLANG

FIRST, NEXT = "| client |", "## What an attack gets\n"
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]
NO_ROUTE, UNSUPPORTED = "no_route", "unsupported"
ASKED, TOKENS = {"messages": MESSAGES}, {"token_ids": [5], "sampling_params": {}}
ADAPTER = {"lora_name": "a", "lora_path": "b"}
FILE = "`/update_weights` with a folder inside `--weights-root`"
WORKER = {"master_address": "localhost", "master_port": 1, "rank_offset": 1, "world_size": 2}
TRL = "`jaxengine.rl.integrations.trl`: a `rollout_func`, or `weight_transfer` for AsyncGRPO"
# client -> (what it may not do, method and path, body, status, code of the error, what to use)
CLIENTS = {
    "openai": [
        ("show images", f"POST {CHAT}", {"messages": IMAGE}, 400, 400, "models take text and token ids"),
        ("hear and speak", f"POST {CHAT}", ASKED | {"modalities": ["audio"]}, 400, UNSUPPORTED, ""),
        ("call `functions`", f"POST {CHAT}", ASKED | {"functions": [{"name": "f"}]}, 400, UNSUPPORTED, "`tools`"),
        ("say how hard to think", f"POST {CHAT}", ASKED | {"reasoning_effort": "low"}, 400, UNSUPPORTED,
         "`chat_template_kwargs`, where the template has it"),
        ("complete before a `suffix`", f"POST {COMPLETE}", {"prompt": "1", "suffix": "2"}, 400, UNSUPPORTED, ""),
        ("have the best of several", f"POST {COMPLETE}", {"prompt": "1", "best_of": 2}, 400, UNSUPPORTED,
         "`n`, and choose by logprobs"),
        ("stream with `echo`", f"POST {COMPLETE}", {"prompt": "1", "echo": True, "stream": True}, 400, UNSUPPORTED,
         "one of them"),
        ("keep a conversation here", "POST /v1/responses", {"input": "1"}, 404, NO_ROUTE, f"`{CHAT}`"),
        ("embed, moderate, draw, batch, tune", "POST /v1/embeddings", {"input": "1"}, 404, NO_ROUTE, ""),
    ],
    "trl": [
        ("send weights over NCCL", "POST /init_weight_transfer_engine", {"init_info": WORKER}, 501, "no_nccl", TRL),
        ("chat with images", "POST /v1/chat/completions/render", {"messages": IMAGE}, 404, NO_ROUTE, ""),
        ("load an adapter (AsyncGRPO)", "POST /v1/load_lora_adapter", ADAPTER, 404, NO_ROUTE, "whole weights"),
        ("speak as trl 1.10 and older did", f"POST {SGLANG}", {"prompts": ["1"]}, 400, "unknown_field", "a newer trl"),
    ],
    "renderers, verifiers, prime-rl": [
        ("send images", f"POST {GENERATE}", TOKENS | {"features": {"image": [1]}}, 400, UNSUPPORTED, ""),
        ("ask which experts ran", f"POST {GENERATE}", TOKENS | {"return_routed_experts": True}, 400, UNSUPPORTED,
         "a trainer here takes the same experts: there are no routes to replay"),
        ("load an adapter", "POST /load_lora_adapter", ADAPTER, 404, NO_ROUTE, "whole weights"),
        ("broadcast weights", "POST /init_broadcaster", {}, 404, NO_ROUTE, FILE),
    ],
    "SkyRL": [
        ("call methods of workers", "POST /collective_rpc", {"method": "update_weights_nccl"}, 404, NO_ROUTE, FILE),
        ("end a session", "POST /finish_session", {"session_id": "a"}, 404, NO_ROUTE, "nothing: there are none"),
    ],
    "vLLM's own": [
        ("rename the weights", "POST /update_weight_version", {"new_version": "2"}, 404, NO_ROUTE,
         "`weight_version` beside the weights"),
        ("have the weights' checksums", "POST /weight_checker", {"action": "checksum"}, 404, NO_ROUTE,
         "`return_coordinate`: it holds their digest"),
        ("search by beams", f"POST {COMPLETE}", {"prompt": "1", "use_beam_search": True}, 400, UNSUPPORTED, "`n`"),
        ("name a grammar as V0 did", f"POST {COMPLETE}", {"prompt": "1", "guided_regex": "a"}, 400, UNSUPPORTED,
         "`structured_outputs`"),
        ("pool, score, rank, classify", "POST /score", {"text_1": "a", "text_2": "b"}, 404, NO_ROUTE, ""),
    ],
    "slime, AReaL (SGLang)": [
        ("stream", f"POST {SGLANG}", {"text": "1", "stream": True}, 400, UNSUPPORTED, f"`{COMPLETE}`"),
        ("pause, go on, abort", "POST /pause_generation", {}, 404, NO_ROUTE,
         "`/pause`, `/resume`, `/abort_requests`"),
        ("flush the cache", "GET /flush_cache", None, 404, NO_ROUTE, "`/reset_prefix_cache`"),
        ("give memory back", "POST /release_memory_occupation", {}, 404, NO_ROUTE, "`/sleep`, `/wake_up`"),
        ("send tensors", "POST /update_weights_from_tensor", {}, 404, NO_ROUTE,
         "`/update_weights_from_disk`, or safetensors to `/update_weights`"),
    ],
    "tinker": [("sample or train", "GET /api/v1/healthz", None, 404, NO_ROUTE, "`jaxengine.generate`, `Trainer`")],
    "curl": [("open a websocket", "GET /v1/realtime", None, 404, NO_ROUTE, "a stream of events")],
}  # fmt: skip
NOT_HERE = [(client, *line) for client, lines in CLIENTS.items() for line in lines]


def table() -> str:
    """In Markdown."""
    lines = ["| client | what | it asks | it gets | instead |", "|---|---|---|---|---|"]
    lines += [f"| {who} | {what} | `{where}` | {status} | {use} |" for who, what, where, _, status, _, use in NOT_HERE]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(text[: text.index(FIRST)] + table() + "\n" + text[text.index(NEXT) :])
