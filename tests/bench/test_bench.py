"""The benches' own arithmetic, the GGUF for llama.cpp, and a tiny run; no speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import engine as engine_bench
from bench import gpu_attention, gpu_engine, overlap
from bench.gpu_shapes import CONFIG_26B
from bench.lib import peers
from bench.lib.card import Check, report
from bench.lib.gguf_writer import UNROTATED, gguf_tensors, write_gguf
from bench.lib.models import MOE_50M, BenchModel, random_moe, random_prompts
from bench.lib.peers import OneAtATime
from bench.lib.timing import Timing
from bench.memory import kv_store
from bench.team import metrics_cost
from cluster.checkpoint import Checkpoint
from cluster.spec import ModelSpec

TINY = MOE_50M | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 24,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> BenchModel:
    torch.set_num_threads(1)
    return BenchModel("tiny", random_moe(tmp_path_factory.mktemp("bench") / "tiny", TINY))


def test_a_check_is_kept_missed_or_not_measured() -> None:
    assert Check("fast", 2.0, "x", 1.5).ok is True
    assert Check("fast", 1.0, "x", 1.5).ok is False
    assert Check("quick", 30.0, "µs", 40.0, at_least=False).ok is True
    assert Check("absent", None, "x", 1.5).ok is None


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    report("nothing", {"speed": 1}, [Check("fast", None, "x", 1.5)], ["a card"], keep=False)
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    assert summary["bench"] == "nothing" and summary["results"] == {"speed": 1}
    assert summary["checks"][0] == {
        "name": "fast",
        "value": None,
        "unit": "x",
        "target": ">= 1.5",
        "ok": None,
    }
    assert "a card" in lines


def test_decode_speed_counts_only_while_all_streams_decode() -> None:
    timing = Timing([[1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 3.5]])
    assert timing.decode_tok_s == pytest.approx(4 / 1.5)  # after 2.0, up to 3.5: one and three
    assert timing.output_tok_s == pytest.approx(8 / 4.0)
    assert timing.ttft_s == pytest.approx(1.5)


def test_ratios_compare_repetitions_in_pairs() -> None:
    fast = [Timing([[0.0, 1.0 / speed]]) for speed in (100.0, 50.0, 120.0)]
    slow = [Timing([[0.0, 1.0 / speed]]) for speed in (50.0, 25.0, 40.0)]
    timings = {"ours": {1: fast}, "theirs": {1: slow}}
    assert engine_bench.ratio(timings, "ours", "theirs", 1) == pytest.approx(2.0)
    assert engine_bench.ratio(timings, "ours", "absent", 1) is None
    assert all(check.ok is None for check in engine_bench.checks_of("tiny", timings))


def test_hidden_share_is_of_the_shorter_side() -> None:
    ways = {
        "serial": overlap.Step(total_s=1.0, dense_s=0.0, waited_s=0.5),
        "overlap": overlap.Step(total_s=0.82, dense_s=0.2, waited_s=0.3),
        "ping-pong": overlap.Step(total_s=0.5, dense_s=0.2, waited_s=0.0),
    }
    assert overlap.hidden_share(ways) == pytest.approx(0.9)
    assert overlap.gains(ways)["ping-pong"] == pytest.approx(1.64)


def test_systems_in_this_process_take_turns(
    tiny_model: BenchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_bench, "PROMPT_LEN", 12)
    monkeypatch.setattr(engine_bench, "NUM_TOKENS", 4)
    systems = ["in-process", "in-process, invariant"]
    timings, failures = engine_bench.measure(tiny_model, systems, [2], 2, float("inf"), 1)
    assert not failures and list(timings) == systems
    for by_streams in timings.values():
        assert [[len(times) for times in t.token_times] for t in by_streams[2]] == [[4, 4], [4, 4]]


def test_one_at_a_time_the_last_waits_for_all_others(
    tiny_model: BenchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "try_experts", lambda model, prompts: "eager")
    alone = Timing([[0.5, 1.0, 2.0]])
    monkeypatch.setattr(peers, "generate_timed", lambda model, prompts, num_tokens: alone)
    timing = OneAtATime(tiny_model, 1).generate([[1], [2], [3]], 3)
    assert timing.token_times == [[0.5, 1.0, 2.0], [2.5, 3.0, 4.0], [4.5, 5.0, 6.0]]
    assert timing.output_tok_s == pytest.approx(alone.output_tok_s)


def test_one_at_a_time_is_measured_at_the_streams_of_its_promise_only(
    tiny_model: BenchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_bench, "PROMPT_LEN", 12)
    monkeypatch.setattr(engine_bench, "NUM_TOKENS", 4)
    systems = ["transformers, static batch", "transformers, one at a time"]
    timings, _ = engine_bench.measure(tiny_model, systems, [1, 16], 1, float("inf"), 1)
    assert [set(timings[name]) for name in systems] == [{1, 16}, {16}]
    card = "\n".join(engine_bench.card_of("tiny", timings, {}))
    assert "one at a time: a call of generate for each prompt" in card
    assert "static batch: all prompts, equally long, in one call" in card


def test_every_tensor_goes_into_the_gguf(tiny_model: BenchModel) -> None:
    spec, checkpoint = ModelSpec.load(tiny_model.model_dir), Checkpoint(tiny_model.model_dir)
    tensors = dict(gguf_tensors(spec, checkpoint))
    assert len(tensors) == len(checkpoint.keys()) + 1  # and the rotary divisors
    divisors = tensors["rope_freqs.weight"]
    assert divisors.tolist() == [1.0] * 4 + [pytest.approx(UNROTATED)] * 12


def test_llama_cpp_computes_the_same_from_the_gguf(tiny_model: BenchModel, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    from transformers import Gemma4ForCausalLM

    params = xllamacpp.CommonParams()
    params.model.path = str(write_gguf(tiny_model.model_dir, tmp_path / "tiny.gguf"))
    params.n_ctx, params.n_parallel, params.verbosity = 256, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    model = Gemma4ForCausalLM.from_pretrained(tiny_model.model_dir)
    for prompt in random_prompts(tiny_model, 3, 48, seed=1):
        request = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": 8}
        answer = server.handle_completions(request | {"ignore_eos": True})
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        differences = [abs(entry["logprob"] - expected[entry["id"]].item()) for entry in top]
        assert max(differences) < 0.02  # its GELU is a table in fp16
        assert top[0]["id"] == int(expected.argmax())


def test_the_gpu_bench_runs_in_a_tiny_shape(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_engine, "PROMPT_LEN", 12)
    options = [
        "--tiny",
        "--alone",
        "--no-keep",
        "--streams",
        "2",
        "--tokens",
        "3",
        "--repeats",
        "1",
    ]
    summary = gpu_engine.main(options)
    assert all(check["ok"] for check in summary["checks"])
    assert summary["results"]["streams"]["2"]["decode_tok_s"] > 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary


def test_the_gpu_attention_bench_runs_in_the_interpreter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = gpu_attention.main(["--tiny", "--no-keep", "--repeats", "1"])
    assert all(check["ok"] for check in summary["checks"] if "error" in check["name"])
    assert summary["results"]["decode"]["96"]["one row"]["us"] > 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary


def test_the_26b_has_the_bytes_that_were_counted() -> None:
    """FIELD: 25.81 B parameters, of which a token uses 3.82 B; embeddings count once here."""
    spec = ModelSpec.from_config(CONFIG_26B)
    everything = gpu_engine.bytes_per_step(spec, 10_000, 0, torch.bfloat16)
    assert everything / 2 == pytest.approx(25.2e9, rel=0.02)  # the text decoder alone
    assert gpu_engine.bytes_per_step(spec, 1, 0, torch.bfloat16) / 2 == pytest.approx(
        3.82e9, rel=0.02
    )


def test_the_kv_store_bench_measures_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    summary = kv_store.main(["--no-keep", "--values", "2", "--rounds", "1"])
    rates = summary["results"]["gb_per_s"]
    assert rates.keys() >= {kv_store.OURS, kv_store.OURS_ON_DISK, "redis-py"}
    assert all(rate > 0 for one in rates.values() for what in one.values() for rate in what)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary


def test_calls_of_metrics_are_counted_for_each_step(tiny_model: BenchModel) -> None:
    costs = dict.fromkeys(metrics_cost.COUNTED, 1e-6)
    with metrics_cost.local_engine(tiny_model) as decoder:
        case = metrics_cost.measure(decoder, costs, 2)
    assert 4 < case["calls"] < 40  # of two streams and of the step, and what a request makes once
    assert case["us"] == pytest.approx(case["calls"], abs=0.1)
    assert case["percent"] == pytest.approx(0.1 * case["us"] / case["step_ms"], rel=0.05)
    assert set(metrics_cost.measure_costs()) == set(costs)
