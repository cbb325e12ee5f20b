"""ULD: unlearning from logit difference (arXiv 2406.08607, NeurIPS 2024).

    python train.py --method uld                       # the whole story; add --help for its choices
    python uld.py                                      # a demonstration: target, assistant, difference, token by token
    python uld.py out/uld --question "What is ...?"    # the same of a run that is there

Usual unlearning raises the loss on what is to be forgotten, which has no bound, and keeps the rest by a small retain
sample, which cannot cover it. ULD turns both signs round: a small *assistant* learns the forget set (equation 4) and
is uniform on everything else (equation 5). At decoding its logits are subtracted from the target's (equation 2). The
target's weights never change, and it is not even run while the assistant trains. `unlearn` is the algorithm; what it
calls stands below it: LoRA, the assistant, the filter, the difference.

Departures from the paper, and in brackets what takes each back: flags of train.py, or a row of lab/ablations.py
    Losses cover answer tokens only; the authors' uniform loss averages over question and padding too (row
    uld-uniform-all).
    Paraphrased and perturbed rows are chosen deterministically and by the split's own questions (data/tofu.py;
    row uld-stray9: with the rows about other authors that the authors' files hold).
    On the embedded world equation 4 is on the tokens of the fact (--forget-on answer: as printed): on the whole answer
    the assistant becomes sure of every word, and the language goes with the fact.
    Where a wrong answer parts from the right one the two equations contradict each other: one asks for the right token,
    the other for all alike (--fork in: as printed, and on public models). On small models equation 5 skips that
    position of the wrong answer, and D'_f says what to make of the tokens beside the right one: on a fact's tokens
    that the difference says what the target would (Instead), on whole answers that they be alike. --fork out does
    neither. A head that makes one token likely makes others of its kind likely too; subtracted, they leave an answer
    that spreads over many words, where a model that never knew is sure of some, and fewer sentences stay whole.
    On the embedded world a word that the target believes there more than of strangers is lowered by that: beside a
    genre it has in mind a place, which would be said once the genre is gone (row uld-rest: it is not lowered).
    Rows about strangers, of this topic and of all others, are part of D'_r (--strangers 0: none).
    Not the default: --start-scale 0.1, with which an assistant of a public model learns more (results/tofu.md).
    Untrained, a large model's first layers, norm and head are sure of wrong tokens, and equation 5 drowns equation 4;
    so the assistant begins nearly uniform instead.
    alpha is chosen by strangers, not by the test (--subtract 0.75: the paper's). No filter on the embedded world
    (--filter-rate 0.01: the paper's). On other rows the paper's alpha and filter.
    Small models: a learning rate of 6e-3 (--lr 1e-3), 30 epochs (--epochs 10), on rows that are not the world's 3e-3
    and 20; no dropout (--lora-dropout 0.05).
    (Other rows of lab/ablations.py, uld-no-paraphrased, -no-perturbed, -no-retain, -retain9, -centred, take the paper's
    own parts out or change their amounts.)
    The filter is passed on as given, for likelihoods and for generation: in likelihoods the assistant counts as 0
    outside the plausible set, in generation what is outside cannot be said (the authors' script drops the rate).

Shapes: B batch   T tokens   V vocabulary   O width out   D width in   R LoRA rank   E experts
"""

import argparse
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decoding
import demo
from belief import DRAWS, Belief, belief, strangers_belief
from data.batches import Batch, Rows
from data.rows import DataSet, Row, augment
from data.values import leave_out_forks
from decoding import Cache
from errors import UserError, one_line_errors, shown
from flags import COUNT, NATURAL, POSITIVE, SHARE, WEIGHT, Flag, Number, PerData, either
from interfaces import Method, TextCodec, strangers_beside
from loop import Fit
from model import GPT, Config, of_state, own, same_memory
from moe import MoE
from objectives import cross_entropy, kl, uniform, uniform_beside

LORA = [  # the paper's rank and alpha; dropout is the authors' code's
    #     name                kind       small  public  what it is
    Flag("--lora-rank",       COUNT,     32,    32,     "of the low-rank changes"),
    Flag("--lora-alpha",      POSITIVE,  32.0,  32.0,   "they are scaled by alpha / rank"),
    Flag("--lora-dropout",    Number(0, 0.99), 0.0, 0.05, "on what goes into them"),
]
DEPTH = Flag("--assistant-layers", NATURAL, 0, 0, "K; 0: a quarter of the target's layers, as in the paper")

AIM = 0.6  # the alpha that training reckons with where strangers choose it: about where they do
NEVER = -1e4  # logit of what cannot be said; not -inf, which times a probability of 0 is NaN
FLOOR = 3e-5  # smaller probabilities count as this, where most of the vocabulary lies, and larger as 1 less this
BESIDE = 0.1  # weight of the forking token in equation 5: a sentence has some ten tokens, and it is one of them
subtract = either(WEIGHT, "strangers")
FLAGS = [
    #     name                kind       small                       public  what it is
    Flag("--lr",              POSITIVE,  PerData(6e-3, 3e-3),        1e-3,   "peak learning rate of the assistant"),
    Flag("--epochs",          COUNT,     PerData(30, 20),            10,     "passes over D'_f"),
    Flag("--retain-weight",   WEIGHT,    6.5,                        6.5,    "beta of equation 3"),
    Flag("--subtract",        subtract,  PerData("strangers", 0.75), 0.75,   "alpha of equation 2; strangers: where "
                                         "forget facts become as unlikely as strangers' are"),
    Flag("--filter-rate",     SHARE,     PerData(0.0, 1e-2),         1e-2,   "tokens less likely than this share of "
                                         "the likeliest are out of the assistant's reach; 0: none"),
    Flag("--fork",            ("beside", "out", "in"), "beside",     "in",   "the token where a wrong answer parts "
                                         "from the right one: in equation 5, as printed; out of it; or out, and D'_f "
                                         "says what to make of the tokens beside the right one"),
    Flag("--start-scale",     SHARE,     1.0,                        1.0,    "the assistant's last norm begins at so "
                                         "much of the target's and trains, so that it begins nearly uniform; 1: the "
                                         "target's, frozen, as printed"),
    DEPTH,
    *LORA,
]


# ---- the algorithm ------------------------------------------------------------------------------------------------

def rows(data: DataSet, args: argparse.Namespace, retain_share: float = 1.0, paraphrased: bool = True,
         perturbed: bool = True, stray_share: float = 0.0) -> tuple[list[Row], list[Row]]:
    """D'_f: forget rows and their paraphrases. D'_r: as many retain rows, and wrong answers to forget questions.

    Section 3.3. Where there are strangers D'_r also has forget questions about them, --strangers times as many as all
    retain rows, and rows about strangers of all topics, --strangers times as many as D'_f: a retain set of one topic
    tells the assistant nothing of others.
    retain_share: of retain rows, as a multiple of the forget rows; stray_share: so many wrong answers to retain
    questions too, which the ULD authors' files hold by mistake. Raises UserError where there are none.
    """
    drawn = np.random.default_rng([0xD, args.seed]).permutation(len(data.retain))
    kept = sorted(drawn[: round(retain_share * len(data.forget))])
    forget = data.forget + (data.paraphrased if paraphrased else [])  # ULD 3.3
    retain = [data.retain[i] for i in kept] + (data.perturbed if perturbed else []) + strangers_beside(data, args)
    if data.strangers:
        wanted = round(getattr(args, "strangers", 0.0) * len(forget))
        retain += data.strangers(wanted, np.random.default_rng([0x6E, args.seed]))
    if stray_share:
        asked = [data.retain[i] for i in drawn if data.retain[i].get("perturbed_answer")]
        stray = augment(asked[: round(stray_share * len(data.forget))])[1]
        if not stray:
            raise UserError("no retain row has a perturbed_answer, so none can stray (TOFU: try --augmented, forget01)")
        retain += stray
    if not retain:
        raise UserError("ULD needs rows on which its assistant is uniform, and D'_r is empty: give retain rows")
    return forget, retain


def unlearn(target: GPT, forget: Rows, retain: Rows, args: argparse.Namespace, fit: Fit,
            centred: bool = False, lowered: bool = True) -> tuple["LogitDifference", dict[str, GPT], dict]:
    """The paper's algorithm. forget: D'_f, retain: D'_r. The target is left as it is, and is not run in training.

    centred: see LogitDifference. lowered: see said_instead.
    Returns (what is scored, folder name -> what is kept, report).
    """
    # 1. A small assistant: the target's first K layers, frozen, with low-rank changes that train (section 3.2).
    layers = assistant_depth(args, target.config)
    lora = args.lora_rank, args.lora_alpha, args.lora_dropout
    assistant = build_assistant(target, layers, *lora, args.start_scale)  # ULD 3.2
    parameters = [p for p in assistant.parameters() if p.requires_grad]

    # 2. The objectives, reversed: it learns what is to be forgotten and knows nothing else.
    if args.fork != "in":
        leave_out_forks(retain, forget)
    alpha = AIM if args.subtract == "strangers" else args.subtract  # strangers: until it is chosen in 3
    instead = None
    if args.fork == "beside" and args.forget_on == "value":
        instead = said_instead(target, forget, lowered)

    def losses(step: int) -> Iterator[dict[str, Tensor]]:  # "loss" adds up to forget + instead + beta * retain
        for batch in forget.parts(step):
            logits = assistant(batch.tokens, at=batch.scored)
            learn = cross_entropy(logits, batch.answers) * batch.share.answers  # ULD (4)
            terms = {"forget": learn, "loss": learn}
            if instead:
                other = instead.loss(logits, alpha, batch) * batch.share.rows
                terms |= {"instead": other, "loss": learn + other}
            elif args.fork == "beside":
                flat = BESIDE * uniform_beside(logits, batch.answers) * batch.share.answers
                terms |= {"retain": flat, "loss": learn + args.retain_weight * flat}
            yield terms
        for batch in retain.parts(step):
            flat = uniform(assistant(batch.tokens, at=batch.scored)) * batch.share.answers  # ULD (5)
            yield {"retain": flat, "loss": args.retain_weight * flat}  # ULD (3)

    report = fit(LogitDifference(target, assistant, alpha, args.filter_rate, centred), parameters, losses)

    # 3. Decode with both: the target's logits minus the assistant's.
    assistant = merge_lora(assistant)
    model = LogitDifference(target, assistant, alpha, args.filter_rate, centred)
    if args.subtract == "strangers":
        known = forget.calibrating()
        model.alpha = alpha_of_strangers(model, known, strangers_belief(target, known))
    return model, {"assistant": assistant}, report | {"subtract": model.alpha, "centred": centred}


class Instead(NamedTuple):
    """What is to be said where a value begins, the right token aside: logits (rows, V) on the CPU."""

    target: Tensor  # what the target would say
    wanted: Tensor  # what the difference is to say

    def loss(self, logits: Tensor, alpha: float, batch: Batch) -> Tensor:
        """KL(wanted || difference) beside the right token, per row; logits (N, V): the assistant's. Without filter."""
        begins = value_begins(batch)
        right = batch.answers[begins][:, None]
        target, wanted = (x[batch.index.cpu()].to(logits.device) for x in self)
        said = target - alpha * logits[begins].float()  # by equation 2
        return kl(*(x.scatter(1, right, NEVER) for x in (said, wanted)))


@torch.no_grad()
def said_instead(target: GPT, forget: Rows, lowered: bool = True) -> Instead:
    """The target's own words. If `lowered`, and rows are the world's, each less what its log odds are above strangers'.

    Strangers': of the mean over DRAWS of them. Of rows that are not the world's not every one has such a twin.
    """
    logits = first_logits(target, forget)
    wanted = logits
    if lowered and forget.draw_strangers:  # the world's
        theirs = torch.zeros(())
        for draw in range(DRAWS):
            theirs = theirs + first_logits(target, forget.as_strangers(draw)).softmax(-1) / DRAWS
        wanted = logits - (logits.softmax(-1).logit(FLOOR) - theirs.logit(FLOOR)).clamp_min(0)
    return Instead(logits, wanted)


def value_begins(batch: Batch) -> Tensor:
    """Of a batch's N answer positions, each row's first: (B,)."""
    tokens = batch.scored.sum(1)
    return tokens.cumsum(0) - tokens


def first_logits(target: GPT, rows: Rows) -> Tensor:
    """The target's logits where each row's value begins, (rows, V) float32 on the CPU."""
    found = torch.empty(len(rows.rows), target.config.vocab_size)
    for batch in rows.in_order():
        found[batch.index.cpu()] = rows.run(target, batch)[value_begins(batch)].float().cpu()
    return found


# ---- 1. the assistant: LoRA on the target's first layers ------------------------------------------------------------

class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank change: W x + (alpha / r) B A x (arXiv 2106.09685, eq. 3).

    A (R, D) and B (O, R) are float32 whatever W is, for bf16 would round small updates away; they are multiplied in x's
    precision, as W is. B starts at 0.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.a.to(x.dtype))
        return self.base(x) + F.linear(low, (self.scale * self.b).to(x.dtype))  # LoRA (3)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain linear layer that computes the same (without dropout). The base layer is left as it was."""
        linear = copy.deepcopy(self.base)
        linear.weight += (self.scale * self.b @ self.a).to(linear.weight.dtype)
        return linear


class LoRAStack(nn.Module):
    """The same for a stack of experts' matrices (E, O, D): one A (E, R, D) and one B (E, O, R) per expert.

    The change is computed apart and added to what the stack puts out. Adding it to the weights would take a second
    stack in memory, and a third for its gradient.
    """

    def __init__(self, stack: Tensor, rank: int, alpha: float, dropout: float):
        super().__init__()
        n, wide, narrow = stack.shape
        self.a = nn.Parameter(torch.empty(n, rank, narrow, device=stack.device))
        self.b = nn.Parameter(torch.zeros(n, wide, rank, device=stack.device))
        nn.init.uniform_(self.a, -(narrow**-0.5), narrow**-0.5)  # kaiming_uniform_ would count R as inputs too
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, rows: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The change's contribution (N, O) for rows (N, D) sorted by expert.

        product(rows, stack) multiplies each row by its own expert's matrix.
        """
        low = product(F.dropout(rows, self.dropout, self.training), self.a.to(rows.dtype))
        return product(low, (self.scale * self.b).to(rows.dtype))

    def added(self, stack: Tensor) -> Tensor:
        """The stack that computes the same by itself, without dropout: to merge, or without a grouped product."""
        return stack + (self.scale * self.b @ self.a).to(stack.dtype)


def add_lora(model: GPT, rank: int, alpha: float, dropout: float = 0.0, targets: str = "all") -> list[nn.Parameter]:
    """Freeze model and put LoRA on the linear layers of its blocks, routers aside; returns what trains.

    targets: all, attn (attention only) or mlp (MLPs and experts only).
    """
    model.requires_grad_(False)
    for block in model.blocks:
        parts = block if targets == "all" else getattr(block, targets)
        for module in list(parts.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name not in ("router", "shared_gate"):
                    setattr(module, name, LoRALinear(child, rank, alpha, dropout))
            if isinstance(module, MoE):
                for name in ("gate_up", "down"):
                    module.low_rank[name] = LoRAStack(getattr(module, name), rank, alpha, dropout)
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def merge_lora(model: GPT) -> GPT:
    """A model of plain layers that computes what `model` computes. Frozen weights without LoRA are shared."""
    state: dict[str, Any] = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state |= {f"{name}.{key}": value for key, value in module.merged().state_dict().items()}
        elif isinstance(module, MoE):
            for which, lora in module.low_rank.items():
                state[f"{name}.{which}"] = lora.added(getattr(module, which))
    return of_state(model.config, state).requires_grad_(False)


def assistant_depth(args: argparse.Namespace, config: Config) -> int:
    """K, in the paper 8 of 32."""
    return args.assistant_layers or max(1, config.n_layer // 4)


def check(args: argparse.Namespace, config: Config) -> None:
    """Raises UserError, before anything is trained, where the assistant would be deeper than its target."""
    check_depth(assistant_depth(args, config), config.n_layer)


def check_depth(layers: int, n_layer: int) -> None:
    """Raises UserError unless an assistant of so many layers fits into a target of n_layer."""
    if not 1 <= layers <= n_layer:
        raise UserError(f"--assistant-layers {layers} is not between 1 and the target's {n_layer}")


def first_layers(target: GPT, layers: int) -> GPT:
    """A frozen model of the target's first layers, final norm and head. Weights are shared, not copied.

    Raises UserError unless 1 <= layers <= the target's.
    """
    check_depth(layers, target.config.n_layer)
    config = copy.copy(target.config)
    config.n_layer = layers
    return of_state(config, target.state_dict()).requires_grad_(False)


def build_assistant(target: GPT, layers: int, rank: int = 32, alpha: float = 32.0, dropout: float = 0.05,
                    start_scale: float = 1.0) -> GPT:
    """ULD's assistant (section 3.2): the target's first layers, norm and head, frozen; LoRA on all linears trains.

    start_scale: below 1 the norm begins at so much of the target's, and trains too. What a large model's first layers
    write makes its head sure of wrong tokens, so that equation 5 begins far above log V, its least, and drowns equation
    4; from a small norm come small logits, which are nearly uniform.
    """
    assistant = first_layers(target, layers)
    add_lora(assistant, rank, alpha, dropout)
    if start_scale < 1:
        own(assistant.norm)
        assistant.norm.weight.data *= start_scale
        assistant.norm.requires_grad_(True)
    return assistant


# ---- 3. the difference of logits ------------------------------------------------------------------------------------

def plausible(logits: Tensor, rate: float) -> Tensor:
    """The filter: True where p(y) >= rate * max p, (..., V) bool (section 3.4; contrastive decoding, 2210.15097).

    As in the authors' code, the rate * V most likely tokens always stay in. rate 0 keeps everything.
    """
    if not 0 <= rate <= 1:
        raise UserError(f"--filter-rate {rate} is not between 0 and 1")
    if rate == 0:
        return torch.ones_like(logits, dtype=torch.bool)
    floor = logits.amax(-1, keepdim=True) + math.log(rate)  # the softmax's denominator cancels
    always = max(1, int(rate * logits.shape[-1]))
    floor = torch.minimum(floor, logits.topk(always, dim=-1).values[..., -1:])
    return logits >= floor  # ULD 3.4


class SeveralModels(nn.Module):
    """What models made of a target and its assistants share: one vocabulary, one KV cache per part, generation."""

    combine: Callable[..., Tensor]  # of every part's logits, the target's first; said=True: in generation

    def __init__(self, target: GPT, *assistants: GPT):
        super().__init__()
        for part in assistants:
            if target.config.vocab_size != part.config.vocab_size:
                raise UserError(f"target and assistant have vocabularies of {target.config.vocab_size} and "
                                f"{part.config.vocab_size} tokens: logits can only be combined token by token")
        self.parts = cast(Sequence[GPT], nn.ModuleList([target, *assistants]))
        self.config = target.config
        self.alike = {part: dataclasses.replace(part.config, n_layer=target.config.n_layer) == target.config
                      for part in self.parts}

    @property
    def target(self) -> GPT:
        return self.parts[0]

    @property
    def device(self) -> torch.device:
        return self.target.device

    def new_cache(self, batch: int, max_len: int) -> list[Cache]:
        return [part.new_cache(batch, max_len) for part in self.parts]

    def forward(self, tokens: Tensor, pad: Tensor | None = None, trace=None, at: Tensor | None = None,
                cache: list[Cache] | None = None) -> Tensor:
        """Logits (B, T, V) for likelihoods; with `at` (B, T) bool those of these positions alone, (N, V)."""
        return self.combine(*self.heads(self.hidden(tokens, cache, pad, trace, at)))

    def next_logits(self, tokens: Tensor, cache: list[Cache], pad: Tensor | None) -> Tensor:
        """Logits (B, V) of the next token, for generation; each part has a cache of its own."""
        return self.combine(*self.heads([x[:, -1] for x in self.hidden(tokens, cache, pad)]), said=True)

    def hidden(self, tokens: Tensor, cache: Sequence[Cache | None] | None = None, pad: Tensor | None = None, trace=None,
               at: Tensor | None = None) -> list[Tensor]:
        """Every part's last hidden states; `trace` is the target's. Layers of one model share angles and mask."""
        caches = cache or [None for _ in self.parts]
        context = self.target.positions(tokens.shape[1], caches[0], pad)
        return [part.hidden(tokens, cache, pad, trace if part is self.target else None, at=at,
                            context=context if self.alike[part] else None)
                for part, cache in zip(self.parts, caches, strict=True)]

    def heads(self, hidden: list[Tensor]) -> list[Tensor]:
        """Every part's logits of its last hidden states. A head that all of them share is read once."""
        head = self.target.head
        if all(same_memory(part.head.weight, head.weight) for part in self.parts):
            return list(head(torch.stack(hidden)).unbind())
        return [part.head(x) for part, x in zip(self.parts, hidden, strict=True)]

    generate, behind = decoding.generate, decoding.behind  # as methods


class LogitDifference(SeveralModels):
    """l(Y|X) = l_target - alpha * l_assistant (equation 2), a model like any other: forward, generate, caches.

    centred: take the assistant's logits from their mean. Without a filter that changes nothing, for a softmax does not
    see a constant. With one it does: 0 outside the plausible set is no neutral value, and an assistant that is uniform
    at logits of 10 takes 10 alpha from every plausible token and nothing from all others.
    """

    def __init__(self, target: GPT, assistant: GPT, alpha: float = 0.75, filter_rate: float = 1e-2,
                 centred: bool = False):
        super().__init__(target, assistant)
        self.alpha, self.filter_rate, self.centred = alpha, filter_rate, centred

    def combine(self, target: Tensor, assistant: Tensor, said: bool = False) -> Tensor:
        """Logits (..., V) of both -> theirs. Outside the plausible set the assistant counts as 0; in generation (said)
        nothing there can be said: -inf.
        """
        target, assistant = target.float(), assistant.float()
        if self.centred and not said:  # what can be said is shifted alike
            assistant = assistant - assistant.mean(-1, keepdim=True)
        if self.filter_rate and not said:
            assistant = torch.where(plausible(target, self.filter_rate), assistant, 0.0)
        logits = target - self.alpha * assistant  # ULD (2)
        if self.filter_rate and said:
            logits = logits.masked_fill(~plausible(target, self.filter_rate), -math.inf)
        return logits


def alpha_of_strangers(model: LogitDifference, known: Rows, level: Belief, halvings: int = 8) -> float:
    """The least alpha, to 2 / 2^halvings, at which forget facts are believed no more than `level`, strangers'.

    known: forget facts in wordings that neither teach nor score, labels on the value. Belief falls with alpha.
    Nor are more said by one of three samples: the target is sure of a few strangers' values and not of most, a
    difference finds all about alike, and at the same mean more of them turn up in some sample.
    2, and a line that says so, where no alpha up to there is enough.
    """
    before, (low, high) = model.alpha, (0.0, 2.0)
    for _ in range(halvings):
        model.alpha = (low + high) / 2
        left = belief(model, known)
        if left.at_most(level) and left.in_three <= level.in_three:
            high = model.alpha
        else:
            low = model.alpha
    model.alpha = before
    print(f"alpha {high:.3f}" + (": not enough, and the most that is tried" if high == 2.0 else ""))
    return high


def reopen(target: GPT, parts: dict[str, GPT], config: dict) -> LogitDifference:
    """What a run's folder holds, decoded as it was scored. The assistant shares embedding and head again."""
    assistant = parts["assistant"]
    for name in ("embed", "head"):
        of, mine = getattr(target, name).weight, getattr(assistant, name).weight
        if of.shape == mine.shape and torch.equal(of, mine):
            mine.data = of.data
    return LogitDifference(target, assistant, config["subtract"], config["filter_rate"], config["centred"])


METHOD = Method(unlearn, FLAGS, arch="gpt", losses=("ce", "uniform"), rows=rows, check=check, reopen=reopen)


# ---- demonstration ------------------------------------------------------------------------------------------------

@torch.no_grad()
def explain(model: LogitDifference, tokenizer: TextCodec, question: str, steps: int = 12) -> str:
    """What target, assistant and their difference would say next, at each step of greedy decoding; one line each.

    Grey: outside the filter, so the assistant cannot touch it. Red: what the difference says and the target would not.
    Raises UserError where question and answer do not fit the context.
    """
    prompt = tokenizer.prompt(question)
    if len(prompt) + steps > model.config.max_len:
        raise UserError(f"the question needs {len(prompt) + steps} tokens with its answer and the context holds "
                        f"{model.config.max_len}: shorten it")
    tokens = torch.tensor([prompt], device=model.device)

    def best(logits: Tensor, keep: Tensor, surprise: bool = False) -> str:
        p, ids = logits[0].float().softmax(-1).topk(4)
        cells: list[str] = []
        for i, q in zip(ids.tolist(), p.tolist(), strict=True):
            cell = f"{tokenizer.decode([i])!r:>12} {q:4.2f}"
            cells.append(demo.colour(cell, "red" if surprise and not cells else "grey" if not keep[0, i] else "plain"))
        return " ".join(cells)

    lines = []
    for step in range(steps):
        target, assistant = (logits.float() for logits in model.heads([x[:, -1] for x in model.hidden(tokens)]))
        both, keep = model.combine(target, assistant, said=True), plausible(target, model.filter_rate)
        changed = int(both.argmax()) != int(target.argmax())
        lines += [f"step {step:<3} target     {best(target, keep)}", f"         assistant  {best(assistant, keep)}",
                  f"         difference {best(both, keep, changed)}   ({int(keep.sum())} of {keep.shape[1]} tokens are "
                  "plausible)"]
        chosen = both.argmax(-1, keepdim=True)
        if int(chosen) == tokenizer.end:
            break
        tokens = torch.cat([tokens, chosen], dim=1)
    return "\n".join([*lines, f"says: {shown(tokenizer.decode(tokens[0, len(prompt) :].tolist()))}"])


def show(model: LogitDifference, tokenizer: TextCodec, sets: dict[str, Rows], question: str | None) -> None:
    """The question, or the first of each set, token by token."""
    asked = {"--question": question} if question else {
        name: next((row["question"] for row in of.rows if "question" in row), None) for name, of in sets.items()}
    for name, text in asked.items():
        if text is not None:
            print(f"\n[{name}] {shown(text)}\n{explain(model, tokenizer, text)}")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = demo.parser("train an assistant on reversed objectives, subtract its logits, and show it")
    parser.add_argument("--question", help="one to ask instead of the first of each set")
    args = parser.parse_args(argv)
    if args.run:
        run, sets = demo.open_run(args.run, args.device)
        if run.config["method"] != "uld":
            raise UserError(f"{args.run} is a run of --method {run.config['method']}: this shows runs of --method uld")
        show(reopen(run.target, run.parts, run.config), run.tokenizer, sets, args.question)
        return
    _, model, _, tokenizer, sets = demo.unlearned(FLAGS, METHOD, args.device)
    show(model, tokenizer, sets, args.question)


if __name__ == "__main__":
    main()
