"""Text that the model writes during and after training: the quickest sign of life there is."""

from __future__ import annotations

from trainwright.base.events import emit
from trainwright.config import SampleSection
from trainwright.engine import StepReport
from trainwright.inference import GenerationOptions, Generator
from trainwright.trainer.cadence import Cadence
from trainwright.trainer.callbacks import Callback
from trainwright.trainer.ranks import due_together
from trainwright.trainer.run import Run

__all__ = ["Sampling"]


class Sampling(Callback):
    """Continues the recipe's prompts every so often and at the end, as `sample` events.

    The draws have a seed of their own, so sampling does not change training.
    """

    name = "sampling"

    def __init__(self, section: SampleSection, cadence: Cadence) -> None:
        self._section = section
        self._cadence = cadence
        self._tokens = 0

    def on_run_start(self, run: Run) -> None:
        self._tokens = run.state.tokens  # those of a resumed run are no interval that has just ended

    def on_step_end(self, run: Run, report: StepReport) -> None:
        before, self._tokens = self._tokens, run.state.tokens
        moment = {"step": run.state.step, "tokens": run.state.tokens, "previous_tokens": before}
        if due_together(run.ranks, self._cadence, moment):
            self._write(run)

    def on_run_end(self, run: Run) -> None:
        self._write(run)

    def _write(self, run: Run) -> None:
        section = self._section
        options = GenerationOptions(
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=1.0 if section.top_p is None else section.top_p,
            seed=section.seed,
        )
        model = run.engine.model
        was_training = model.training
        model.eval()
        try:
            with run.engine.averaged():
                generated = Generator(model, run.tokenizer).generate(list(section.prompts), options)
        finally:
            model.train(was_training)
        for prompt, result in zip(section.prompts, generated, strict=True):
            emit("sample", step=run.state.step, prompt=prompt, text=result.text)
