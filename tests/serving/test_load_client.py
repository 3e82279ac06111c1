"""A loaded client is a Hugging Face model: what others do with one works on it."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StoppingCriteriaList,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fedalt
from fedalt.config.settings import config_from_dict
from fedalt.model.states import adapter_state, load_adapter_state, part_of
from tests.conftest import write_client
from tests.kernels.budget import excess

PROMPTS = ["### Instruction:\nsay 1\n\n### Response:\n", "say 2"]


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """A run of two clients and one round."""
    root = tmp_path_factory.mktemp("finished")
    for client in ("ann", "bob"):
        write_client(root / "data" / client, client[0], 4)
    settings = {
        "rounds": 1,
        "threads": 1,
        "out": str(root / "run"),
        "model": {"path": str(tiny_base)},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "data": {"path": str(root / "data")},
        "train": {"batch_size": 4, "max_steps": 3},
        "evaluate": {"max_new_tokens": 4},
    }
    fedalt.Federation(config_from_dict(settings)).run()
    return root / "run"


@pytest.fixture
def client(finished):
    """Model and tokenizer, its adapters and mixers drawn anew, large enough to matter."""
    model, tokenizer = fedalt.load_client(finished, "ann")
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) / 4
        for name, tensor in adapter_state(model).items()
    }
    load_adapter_state(model, state)
    return model, tokenizer


def answers(client, prompts, **settings):
    """The tokens after the prompts, cut at their first end."""
    model, tokenizer = client
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = {"max_new_tokens": 12, "do_sample": False, **settings}
    made = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in made]


@pytest.mark.parametrize("num_beams", [1, 4])
def test_generation_with_a_cache_is_generation_without(client, num_beams):
    cached = answers(client, PROMPTS, num_beams=num_beams)
    assert cached == answers(client, PROMPTS, num_beams=num_beams, use_cache=False)
    assert all(len(answer) > 3 for answer in cached)
    assert cached[0] != cached[1]


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_left_padded_batch_answers_as_its_prompts_alone(client, num_beams):
    together = answers(client, PROMPTS, num_beams=num_beams)
    assert together == [answers(client, [prompt], num_beams=num_beams)[0] for prompt in PROMPTS]


def trainer_of(client, folder, **settings):
    model, tokenizer = client
    rows = [tokenizer(f"say {i} ann")["input_ids"] for i in range(8)]
    arguments = TrainingArguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **settings,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trainer_moves_the_trained_tensors_alone(client, tmp_path, gradient_checkpointing):
    model, _ = client
    before = copy.deepcopy(model.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {part_of(name) for name in trained} == {"individual.a", "individual.b", "mixer"}
    trainer = trainer_of(
        client, tmp_path, save_strategy="no", gradient_checkpointing=gradient_checkpointing
    )
    trainer.train()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == trained


def test_what_trainer_saved_loads_into_the_client(client, finished, tmp_path):
    trainer = trainer_of(client, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    fresh, tokenizer = fedalt.load_client(finished, "ann")
    fresh.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, client[0].eval()(ids).logits)
    again = trainer_of((fresh, tokenizer), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = adapter_state(fresh), adapter_state(client[0])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_client_over_tied_embeddings_is_saved_and_loaded(tmp_path):
    """Its output head is the embedding; safetensors holds it once."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    made = [fedalt.inject(LlamaForCausalLM(config).eval(), rank=2) for _ in range(2)]
    load_adapter_state(made[0], {n: t + 0.1 for n, t in adapter_state(made[0]).items()})
    made[0].save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in saved
    missing, unexpected = made[1].load_state_dict(saved, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(made[1](ids).logits, made[0](ids).logits)


@torch.no_grad()
def test_a_compiled_forward_is_the_eager_one(client):
    """Whole, without a break in the graph. The longest sum has 48 products."""
    model, tokenizer = client
    del model.model.layers[1]  # what a second layer compiles to is the same, and takes as long
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    eager = model(ids, use_cache=False).logits
    scalar = {"cpp.simdlen": 1}  # its C++ takes half the time to compile
    got = torch.compile(model, fullgraph=True, options=scalar)(ids, use_cache=False).logits
    truth = copy.deepcopy(model).double()(ids, use_cache=False).logits
    for kind, share in excess(got, eager, truth, 48).items():
        assert share <= 1, f"{kind} error is {share:.2f} times its budget"


@torch.no_grad()
def test_the_evaluation_harness_finds_what_it_relies_on(client):
    """The contract of lm-evaluation-harness: ``HFLM(pretrained=model, tokenizer=tokenizer)``.

    The harness itself (0.4.13) brings 32 packages and an older python-dateutil, so it is not
    installed here; it was tried by hand, on local tasks of both its kinds. This does to the model
    what ``lm_eval.models.huggingface`` does: read its device and config, tie its weights, score
    continuations by one forward over right-padded rows, and generate from left-padded ones with a
    cache and stopping criteria.
    """
    model, tokenizer = client
    assert isinstance(model, PreTrainedModel)
    assert model.device.type == "cpu"
    assert model.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert model.config.max_position_embeddings == 256
    assert model.name_or_path
    before = model(torch.tensor([[1, 2, 3]])).logits
    model.eval()
    model.tie_weights()
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)

    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    padded = torch.zeros(2, max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    scored = model(padded).logits
    for row, tokens in zip(scored, rows, strict=True):
        own = model(torch.tensor([tokens])).logits[0]
        assert torch.equal(row[: len(tokens)].argmax(-1), own.argmax(-1))

    batch = tokenizer(PROMPTS, return_tensors="pt", padding="longest", return_token_type_ids=False)
    length = batch["input_ids"].shape[1]

    def five_more(ids, scores):
        return torch.full((len(ids),), ids.shape[1] >= length + 5)

    made = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_length=length + 12,
        stopping_criteria=StoppingCriteriaList([five_more]),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        do_sample=False,
    )
    assert made.shape == (2, length + 5)
    assert tokenizer.decode(made[0, length:].tolist())
