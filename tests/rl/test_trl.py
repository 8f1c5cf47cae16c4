"""TRL's GRPOTrainer over our rollouts. Needs torch and trl 1.16, as .ci/run installs them for the marker `wire`."""

import jax
import numpy as np
import pytest

from checkpoints.model_folder import find_folder
from jaxengine import LLM
from jaxengine.models.named_weights import to_decoder

pytestmark = [pytest.mark.wire, pytest.mark.filterwarnings("default")]  # TRL's own
STEPS, GROUP, PROMPTS = 20, 8, 8


def rewards(prompts, completions, **_) -> list[float]:
    """1 for a right answer."""
    return [float(completion == str(sum_of(prompt))) for prompt, completion in zip(prompts, completions, strict=True)]


def sum_of(prompt: str) -> int:
    left, right = prompt.removesuffix("=").split("+")
    return int(left) + int(right)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the rewards of each step, mean |Δlogprob| against TRL's own forward of each step, weights' versions)."""
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
    from jaxengine.rl.integrations.trl import TrlRollout, mean_abs_difference

    folder = str(find_folder("calc"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    llm = LLM("calc", dtype="float32", progress=False, max_model_len=64, max_num_seqs=64, num_pages=200)
    rollout, differences, versions, mean_rewards = TrlRollout(llm), [], [], []

    def measured(prompts, trainer) -> dict:
        found = rollout(prompts, trainer)
        counts = [len(completion) for completion in found["completion_ids"]]  # of prompts of one length
        rows = zip(found["prompt_ids"], found["completion_ids"], counts, strict=True)
        ids = torch.tensor([prompt + completion + [0] * (max(counts) - count) for prompt, completion, count in rows])
        with torch.no_grad():
            logps, *_ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), max(counts)
            )
        theirs = [row[:count] for row, count in zip(logps.tolist(), counts, strict=True)]
        differences.append(mean_abs_difference(found["logprobs"], theirs))
        versions.append(llm.weights_version)
        return found

    def counted(prompts, completions, **more) -> list[float]:
        found = rewards(prompts, completions, **more)
        mean_rewards.append(float(np.mean(found)))
        return found

    rng = np.random.RandomState(0)
    # As many as a step has prompts, so that every step's rewards are of the same problems.
    problems = [{"prompt": f"{a}+{b}="} for a, b in rng.randint(10, 99, (PROMPTS, 2))]
    args = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), max_steps=STEPS, num_generations=GROUP, learning_rate=5e-5,
        per_device_train_batch_size=GROUP * PROMPTS, max_completion_length=8, temperature=1.0, beta=0.0,
        report_to="none", use_cpu=True, save_strategy="no", logging_steps=1, seed=1, bf16=False, disable_tqdm=True,
        lr_scheduler_type="constant", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model, reward_funcs=counted, args=args, train_dataset=datasets.Dataset.from_list(problems),
        processing_class=tokenizer, rollout_func=measured,
    )  # fmt: skip
    trainer.train()
    return llm, trainer, mean_rewards, differences, versions


def test_rewards_go_up(trained):
    _, _, mean_rewards, *_ = trained
    print("\nrewards of the 20 steps:", [round(reward, 2) for reward in mean_rewards])
    assert len(mean_rewards) == STEPS and np.mean(mean_rewards[-5:]) > np.mean(mean_rewards[:5])


def test_logprobs_are_near_trl_s_before_and_after_updates(trained):
    *_, differences, versions = trained
    print(f"\nmean |Δlogprob|: first step {differences[0]:.2e}, after updates at most {max(differences[1:]):.2e}")
    assert versions == list(range(1, STEPS + 1))  # the weights of each step, the first ones included
    assert max(differences) < 1e-4  # float32 on both sides; weights of one step before are 0.01 away


def test_after_training_the_engine_takes_the_last_weights(trained):
    """And the same call again draws the same bits."""
    llm, trainer, *_ = trained
    from jaxengine.rl.integrations.trl import TrlRollout

    found = [TrlRollout(llm)(["12+30=", "7+8="], trainer) for _ in range(2)]
    assert found[0] == found[1] and trainer.state.global_step == STEPS
    expected = to_decoder({name: x.detach() for name, x in trainer.model.state_dict().items()}, llm.config)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), llm.params, expected)))
