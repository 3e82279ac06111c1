"""Train the tiny base model of the built-in sample, and its tokenizer, on generated text.

    python scripts/train_base.py --out fedalt/assets/base

The model is a Llama of about 1.2 million parameters. The loss counts answers in full and prompts
a little; the first steps are mostly copying, without which copying is hardly learned at all. Hidden
matrices are trained with Muon, everything else with AdamW. The same seed, number of steps and
number of threads give the same model on one machine.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import corpus
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
TEMPLATE_TOKENS = ["### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"]
PIECES = (  # an option's dash; a word, a digit or punctuation with the blank before it; other space
    r"\n- | ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+(?:\n+(?!- ))?|\s+(?!\S)|\s+"
)
ROW_LENGTH = 160
PROMPT_WEIGHT = 0.1


def train_tokenizer(vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the corpus; every fixed part of the prompt is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TEMPLATE_TOKENS),
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((corpus.tokenizer_text(rng) for _ in range(30_000)), trainer)
    tokenizer.add_tokens(TEMPLATE_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with fresh weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


class Batches:
    """Rows of whole records, one after another, with a weight for every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rows: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self.rng = random.Random(seed)

    def draw(self, copying: float = 0.0) -> tuple[Tensor, Tensor]:
        """Token ids and weights [rows, ROW_LENGTH]; a share `copying` of the records are copies."""
        ids: list[list[int]] = [[] for _ in range(self.rows)]
        weights: list[list[float]] = [[] for _ in range(self.rows)]
        for tokens, weight in sorted(self._sequences(copying), key=lambda pair: -len(pair[0])):
            fits = (i for i in range(self.rows) if len(ids[i]) + len(tokens) <= ROW_LENGTH)
            if (row := next(fits, None)) is not None:
                ids[row] += tokens
                weights[row] += weight
        for row in range(self.rows):
            rest = ROW_LENGTH - len(ids[row])
            ids[row] += [self.tokenizer.pad_token_id] * rest
            weights[row] += [0.0] * rest
        return torch.tensor(ids), torch.tensor(weights)

    def _sequences(self, copying: float) -> list[tuple[list[int], list[float]]]:
        """About as many records as fill the rows: ids with BOS and EOS, and their weights."""
        records = [
            corpus.copy(self.rng) if self.rng.random() < copying else corpus.draw(self.rng)[1]
            for _ in range(4 * self.rows)
        ]
        prompts, answers = zip(*map(corpus.render, records), strict=True)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        encoded = (
            self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            for texts in (prompts, answers)
        )
        return [
            (
                [bos, *prompt, *answer, eos],
                [0.0] + [PROMPT_WEIGHT] * len(prompt) + [1.0] * (len(answer) + 1),
            )
            for prompt, answer in zip(*encoded, strict=True)
        ]


def losses(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean loss, and the mean loss of the answers alone."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    each = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    answers = weight == 1
    return (each * weight).sum() / weight.sum(), each[answers].mean().detach()


def make_optimizers(
    model: LlamaForCausalLM, muon_lr: float, adamw_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden, other = [], []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
        (hidden if is_hidden else other).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=muon_lr, momentum=0.95, weight_decay=0.01, ns_steps=4),
        torch.optim.AdamW(other, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def lr_factor(step: int, steps: int) -> float:
    """A short rise, a plateau over the first third, then a straight line down to 2 %."""
    warm = min(1.0, (step + 1) / 50)
    return warm * max(0.02, 1 - max(0.0, step / steps - 1 / 3) * 1.5)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> None:
    """Train `model` in place for `args.steps` steps, saving it now and then."""
    batches = Batches(tokenizer, args.rows, args.seed)
    optimizers = make_optimizers(model, args.muon_lr, args.adamw_lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_rates = [group["lr"] for group in groups]
    started = time.perf_counter()
    model.train()
    for step in range(args.steps):
        for group, rate in zip(groups, full_rates, strict=True):
            group["lr"] = rate * lr_factor(step, args.steps)
        copying = args.copying if step < args.steps / 10 else 0.0
        loss, answer_loss = losses(model, *batches.draw(copying))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}/{args.steps}  {time.perf_counter() - started:.0f} s  "
                f"loss {loss.item():.3f}  answers {answer_loss.item():.3f}",
                flush=True,
            )
        if (step + 1) % 500 == 0:
            save(model, tokenizer, args.out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights (in half precision), configuration and tokenizer to `out`."""
    half = LlamaForCausalLM(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.inference_mode()
def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    families: dict[str, corpus.Family],
    seed: int,
    each: int,
) -> dict[str, float]:
    """Greedy answers that are right to the letter, in percent, by task family."""
    scores = {}
    for name, (_, draw) in families.items():
        rng = random.Random(f"{name} {seed}")
        records = [draw(rng) for _ in range(each)]
        if not records[0].instruction:
            continue
        prompts, answers = zip(*map(corpus.render, records), strict=True)
        inputs = tokenizer(list(prompts), padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
        written = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right = sum(one == other for one, other in zip(written, answers, strict=True))
        scores[name] = 100 * right / each
    return scores


def write_card(scores: dict[str, float], parameters: int, args: argparse.Namespace) -> None:
    """Say beside the model what it is, how it was made and what it can do."""
    rows = [f"| {name} | {score:.1f} |" for name, score in scores.items()]
    settings = " ".join(
        f"--{name.replace('_', '-')} {value}"
        for name, value in sorted(vars(args).items())
        if name != "out"
    )
    lines = [
        "# The base model of the built-in sample",
        "",
        f"A Llama of {parameters:,} parameters with a byte-level BPE of {args.vocabulary} tokens,",
        "trained from nothing on text that `scripts/corpus.py` generates; weights in float16.",
        "Made with:",
        "",
        f"    python scripts/train_base.py --out DIR {settings}",
        "",
        f"Greedy answers that are right to the letter, {args.held_out} held-out records a family:",
        "",
        "| task family | exact match, % |",
        "|---|---:|",
        *rows,
    ]
    (args.out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=16, help=f"rows of {ROW_LENGTH} tokens a step")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adamw-lr", type=float, default=2.5e-3)
    parser.add_argument("--copying", type=float, default=0.7, help="its share in the first tenth")
    parser.add_argument("--held-out", type=int, default=200, help="records a family for the table")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Train, save, load again, test, and write the card."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.vocabulary, args.seed)
    model = new_model(tokenizer, args)
    parameters = model.num_parameters()
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, args)
    save(model, tokenizer, args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    scores = exact_match(saved, tokenizer, corpus.FAMILIES, args.seed + 1, args.held_out)
    for name, score in scores.items():
        print(f"{name:>14} {score:5.1f} %")
    write_card(scores, parameters, args)


if __name__ == "__main__":
    main()
