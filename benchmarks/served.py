"""A model served to the openai client: its greedy text beside transformers', and a JSON schema at temperature 1.

    pip install -e '.[server]' openai torch==2.13.0 && python benchmarks/served.py FOLDER

FOLDER is a chat model in Hugging Face format. Prints Markdown. Ends with 1 where a text differs or an answer does not
follow the schema.
"""

import argparse
import json
import socket
import subprocess
import sys
from typing import Any

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHATS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three fruits and say which of them is red.",
)
ASKED = "Describe a person as JSON: name, age, and up to three hobbies."
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
NUM_TOKENS, NUM_SCHEMAS = 48, 100


def follows(text: str) -> bool:
    """Whether a text is JSON that SCHEMA allows."""
    try:
        match json.loads(text):
            case {"name": str(name), "age": int(age), "hobbies": [*hobbies], **others}:
                strings = all(isinstance(each, str) and len(each) <= 20 for each in hobbies)
                fits = len(hobbies) <= 3 and len(name) <= 30 and 0 <= age <= 120 and type(age) is int
                return strings and fits and not others
    except ValueError:
        pass
    return False


def greedy_of_transformers(folder: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for chat in CHATS:
        messages = [{"role": "user", "content": chat}]
        how = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
        prompt = tokenizer.apply_chat_template(messages, **how)
        found = model.generate(**prompt, do_sample=False, max_new_tokens=NUM_TOKENS)[0]
        texts.append(tokenizer.decode(found[prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def ask(client: openai.OpenAI, content: str, **how: Any) -> str:
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="served", messages=messages, **how).choices[0].message.content or ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxengine", "serve", folder, "--dtype=float32", "--served-model-name=served"]
    server = subprocess.Popen([*command, f"--port={port}", "--max-model-len=1024", "--max-num-seqs=16"])
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0)
        client.with_options(max_retries=100).models.list()  # waits until the server is up
        own = [ask(client, chat, temperature=0.0, max_completion_tokens=NUM_TOKENS) for chat in CHATS]
        asked: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        how = dict(temperature=1.0, max_completion_tokens=400, response_format=asked)
        structured = [ask(client, ASKED, seed=seed, **how) for seed in range(NUM_SCHEMAS)]
    finally:
        server.terminate()
        server.wait()
    others = greedy_of_transformers(folder)
    same, good = sum(map(str.__eq__, own, others)), sum(map(follows, structured))
    for pair in zip(own, others, strict=True):
        print("served, and by transformers:", *map(json.dumps, pair), sep="\n- ")
    print(f"\ngreedy texts that are equal: {same} of {len(CHATS)}; the schema is followed: {good} of {NUM_SCHEMAS}")
    print(f"different answers under the schema: {len(set(structured))}; one of them: {structured[0]}")
    return 0 if same == len(CHATS) and good == NUM_SCHEMAS else 1


if __name__ == "__main__":
    sys.exit(main())
