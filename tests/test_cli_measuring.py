"""The commands that measure and choose: eval, profile, and pack with targets, as processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import CONTEXT, QUESTION, kvlink


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("context") / "context.txt"
    file.write_text(CONTEXT)
    return str(file)


DEMO_FIELDS = (
    "mode recipe recipe_full n f1 f1_low f1_high f1_full agreement wire_bytes bits_per_element ttft_s"
)
EVAL_FIELDS = "selection scope retention method question_shift em kl_mean ci_low ci_high context_tokens seed"


def test_eval_prints_every_table_as_rows_with_every_field(checkpoint, tmp_path):
    model = str(checkpoint("qwen2", "bfloat16"))
    done = kvlink("eval", "all", "--model", model, "--n", "2", "--out", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    tables = {row["table"] for row in report["rows"]}
    assert tables >= {
        "selection",
        "quantization",
        "combined",
        "low-rank",
        "spectrum",
        "transfer",
        "methods",
        "masking",
    }
    assert "overhead" in tables or any("overhead" in note for note in report["notes"])
    for row in report["rows"]:
        assert set(f"{DEMO_FIELDS} {EVAL_FIELDS}".split()) <= set(row)
        assert row["model"] == model
        if row["table"] not in ("spectrum", "overhead"):
            assert row["n"] == 2
            assert row["ci_low"] <= row["f1"] - row["f1_full"] <= row["ci_high"]
    lossless = [row for row in report["rows"] if row["recipe"] in ("raw", "lossless", "text")]
    assert {row["agreement"] for row in lossless if row["f1"] is not None} == {1.0}
    written = {file.name.partition("-")[0] for file in tmp_path.iterdir()}
    assert written == {"all.csv", "all.jsonl", "all.html", "all"}
    (record,) = tmp_path.glob("*.record.jsonl")
    again = kvlink("eval", "quantization", "--from", str(record), "--out", str(tmp_path), "--json")
    assert json.loads(again.stdout)["rows"] == [
        row for row in report["rows"] if row["table"] == "quantization"
    ]


def qwen_shaped(folder: Path) -> Path:
    """A randomly initialised checkpoint of Qwen2.5's shape: grouped heads of 64, tied embeddings, its biases."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from kvlink.model.loading import embedded_folder

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=896, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=4096, rope_theta=1e6,
        tie_word_embeddings=True, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def squad_file(folder: Path) -> Path:
    entries = [
        {"question": f"{word} was Maret Olsun born?", "answers": [{"text": "Tavik"}]}
        for word in ("Where", "In which town")
    ]
    file = folder / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": entries}]}]}))
    return file


def test_eval_on_a_squad_file_with_two_models_side_by_side(checkpoint, tmp_path):
    models = [str(qwen_shaped(tmp_path / "qwen")), str(checkpoint("llama", "float32"))]
    done = kvlink(
        "eval", "quantization", "--model", models[0], "--model", models[1], "--data", f"squad:{squad_file(tmp_path)}",
        "--n", "2", "--prompt", "plain", "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [run["model"] for run in report["runs"]] == models
    for model in models:
        rows = {row["recipe"]: row for row in report["rows"] if row["model"] == model}
        assert rows["raw"]["agreement"] == 1.0
        assert rows["raw"]["kl_mean"] == 0.0
        assert rows["int8"]["kl_mean"] < rows["int1"]["kl_mean"]


def test_eval_shows_tables_to_people(checkpoint, tmp_path):
    done = kvlink(
        "eval", "methods", "--model", str(checkpoint("qwen2", "bfloat16")), "--n", "1", "--out", str(tmp_path)
    )
    shown = done.stdout.decode()
    assert "methods: F1 (of full)" in shown
    assert "snapkv+question" in shown
    assert "sees: q2c: context and question" in shown
    assert f"written: {tmp_path / 'methods.csv'}" in shown


def test_pack_can_be_asked_for_bits_a_budget_a_quality_and_a_check(context, tmp_path):
    out = str(tmp_path / "kept.kvl")
    told = {}
    for name, words in {
        "auto": ["--recipe", "auto"],
        "bits": ["--recipe", "auto", "--bits", "2"],
        "budget": ["--recipe", "auto", "--budget", "5kB"],
        "quality": ["--recipe", "transform=0.5", "--quality", "0.9"],
        "verify": ["--recipe", "int1", "--verify"],
    }.items():
        done = kvlink("pack", "--context", context, "--question", QUESTION, "-o", out, "--json", *words)
        assert done.returncode == 0, done.stderr
        told[name] = json.loads(done.stdout)
    assert told["bits"]["bits_per_element"] <= 2
    assert told["budget"]["wire_bytes"] <= 5000
    assert "transform=" in told["auto"]["recipe_full"]
    assert told["verify"]["certificate"]["agreeing_tokens"] == told["verify"]["certificate"]["tokens"]
    shown = kvlink(
        "pack", "--context", context, "--question", QUESTION, "-o", out, "--recipe", "auto", "--verify"
    )
    assert b"tokens of the sender's own answer" in shown.stdout
    assert kvlink("unpack", out, "--question", QUESTION).returncode == 0


def test_profiles_are_built_shown_and_checked(tmp_path, checkpoint):
    file = str(tmp_path / "tiny.profile")
    built = kvlink("profile", "build", "kvlink-tiny", "-o", file, "--n", "2", "--checks", "1", "--json")
    assert built.returncode == 0, built.stderr
    shown = json.loads(kvlink("profile", "show", file, "--json").stdout)
    assert shown == json.loads(built.stdout)
    assert shown["layers"] == 4
    assert set(shown["quality"]) >= {"0.25", "1", "4"}
    assert kvlink("profile", "check", file, "kvlink-tiny").returncode == 0
    other = kvlink("profile", "check", file, str(checkpoint("qwen2", "bfloat16")))
    assert other.returncode == 3
    assert b"another model's: weights" in other.stderr


def test_rates_are_measured_on_plain_and_biased_keys(tmp_path):
    done = kvlink("eval", "rate", "--n", "2", "--out", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["variant"] for row in rows} == {"plain", "biased"}
    codecs = {row["codec"] for row in rows}
    assert codecs >= {"raw", "lossless", "int8", "int4", "int4/token", "transform", "transform/own"}
    for variant in ("plain", "biased"):
        found = {r["recipe"]: r for r in rows if r["variant"] == variant and r["question_shift"] == "same"}
        assert found["raw"]["kl_mean"] == 0
        assert found["transform=1"]["bits_per_element"] < 0.5 * found["int4"]["bits_per_element"]
