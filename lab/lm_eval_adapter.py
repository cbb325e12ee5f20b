"""Any run, scored by the LM evaluation harness: MMLU, WMDP, ARC and some thousand tasks more.

    pip install lm_eval                                             # an extra: nothing else here needs it
    python -m lab.lm_eval_adapter out/uoe --tasks wmdp_bio mmlu     # its target, reference and unlearned model
    python -m lab.lm_eval_adapter out/uld --tasks mine --include DIR    # DIR/mine.yaml: a task of one's own

ULD's two models are scored as the one that they make. Texts are given to a model as they are, without a chat template;
what a context cannot hold is cut at its left. Text is generated greedily.

Shapes: B batch   T tokens   V vocabulary
"""

import json
from typing import Any

import torch
from tqdm import tqdm

from data.batches import IGNORE, Example, left_pad
from errors import UserError, one_line_errors
from eval import models_of
from flags import COUNT, NATURAL, Parser
from interfaces import LanguageModel
from lab.tables import number
from methods import open_run
from metrics.likelihood import likelihoods

try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError:  # said when it is asked for
    lm_eval, TemplateLM = None, object  # type: ignore[assignment, misc]


class Harnessed(TemplateLM):
    """A model and its tokenizer as the harness wants them."""

    def __init__(self, model: LanguageModel, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer, self.max_len = model, tokenizer, model.config.max_len

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that nothing else stands before."""
        begin = getattr(self.tokenizer, "begin", None)
        return self.tokenizer.end if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        front = [] if add_special_tokens is False else self.tokenizer.front
        return front + self.tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
        """requests: (texts, context ids, continuation ids) -> (log p of the continuation, whether greedy says it)."""
        examples = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_len + 1) :]
            scored = continuation[-(len(ids) - 1) :] if continuation else []
            examples.append(Example(ids[:-1], [IGNORE] * (len(ids) - 1 - len(scored)) + scored))
        asked = [i for i, (_, _, continuation) in enumerate(requests) if continuation]
        out = [(0.0, True)] * len(examples)
        with tqdm(total=len(asked), desc="score") as bar:
            for i, found in zip(asked, likelihoods(self.model, [examples[i] for i in asked], bar=bar), strict=True):
                out[i] = (found.log_p, found.said)
        return out

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows as long as the context."""
        out = []
        for request in requests:
            windows = utils.get_rolling_token_windows(self.tok_encode(request.args[0], False),
                                                      self.prefix_token_id, self.max_len, 1)
            parts = [("", *utils.make_disjoint_window(window)) for window in windows]
            out.append(sum(log_p for log_p, _ in self._loglikelihood_tokens(parts)))
        return out

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context up to the first of its stop texts."""
        out = []
        for request in tqdm(requests, desc="generate", disable=disable_tqdm):
            context, how = request.args
            if how.get("do_sample") or how.get("temperature"):
                raise UserError("this task samples, and the adapter generates greedily alone: choose another task")
            new = min(how.get("max_gen_toks", 256), self.max_len - 1)
            ids = self.tok_encode(context)[-(self.max_len - new) :] or [self.prefix_token_id]
            tokens, _ = left_pad([ids], self.model.device)
            said = self.tokenizer.decode(self.model.generate(tokens, new, end=self.tokenizer.stops)[0].tolist())
            stops = how.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                said = said.split(stop)[0] if stop else said
            out.append(said)
        return out


def manager_of(tasks: list[str], include: str | None = None) -> Any:
    """The harness' list of tasks; include: a folder with more.

    Raises UserError where the harness is not installed or one of these tasks is not in it.
    """
    if lm_eval is None:
        raise UserError("the LM evaluation harness is not installed: pip install lm_eval")
    manager = TaskManager(include_path=include)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise UserError(f"--tasks: the harness has no {', '.join(unknown)}; `lm_eval ls tasks` lists what it has")
    return manager


def evaluate(model: LanguageModel, tokenizer: Any, tasks: list[str], manager: Any, limit: int | None = None,
             shots: int | None = None) -> dict[str, dict[str, float]]:
    """Task -> measure -> value, as the harness reports them.

    limit: score so many questions of each task; shots: examples before a question, None: the task's own number.
    """
    found = lm_eval.simple_evaluate(Harnessed(model, tokenizer), tasks=tasks, task_manager=manager, limit=limit,
                                    num_fewshot=shots, bootstrap_iters=0, log_samples=False)
    assert found is not None  # on other processes than the first alone
    return {task: {name.split(",")[0]: value for name, value in of.items()
                   if isinstance(value, float | int) and "stderr" not in name and name != "sample_len"}
            for task, of in found["results"].items()}


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """found: role -> task -> measure -> value; a line per task and measure."""
    roles = list(found)
    lines = [f"{'':<40}" + "".join(f"{role:>12}" for role in roles)]
    for task, of in found[roles[0]].items():
        lines += [f"{task + ' ' + name:<40}" + "".join(f"{number(found[role][task][name]):>12}" for role in roles)
                  for name in of]
    return "\n".join(lines)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="score a run by the LM evaluation harness")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="as wmdp_bio, mmlu, arc_easy")
    parser.add_argument("--include", metavar="DIR", help="a folder with tasks of one's own (YAML)")
    parser.add_argument("--limit", type=COUNT, help="score so many questions of each task")
    parser.add_argument("--shots", type=NATURAL, help="examples before a question (default: the task's own number)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print numbers as JSON, in full")
    args = parser.parse_args(argv)
    manager = manager_of(args.tasks, args.include)
    run = open_run(args.run, args.device)
    found = {role: evaluate(model, run.tokenizer, args.tasks, manager, args.limit, args.shots)
             for role, model in models_of(run).items()}
    print(json.dumps(found, indent=1) if args.json else table(found))


if __name__ == "__main__":
    main()
