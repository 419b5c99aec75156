"""The first lines of a reinforcement learning run."""

from typing import Any

from jaxtune import rl
from jaxtune.common.formatting import amount
from jaxtune.training.run_info import RunInfo


class Facts(RunInfo):
    """Facts about a run of `task=ppo` or `task=grpo`, one step of which samples `rl.rollouts` answers."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step learns from, each as often as it does, padding included."""
        return self.config.rl.rollouts * self.config.rl.epochs * self.config.data.seq_len

    def _updates_line(self, run, data: dict[str, Any]) -> str:
        settings, group = self.config.rl, rl.get(self.config.task).group(self.config)
        asked = f'{settings.rollouts // group} prompts x {group} answers' if group > 1 else f'{group} answer each'
        cut = f' in {run.accumulate} micro-batches' if run.accumulate > 1 else ''
        passes = run.steps * settings.rollouts / group / max(len(run.prompts), 1)
        return (
            f'{run.steps:,} steps of {settings.rollouts} answers ({asked}) from {amount(len(run.prompts))} prompts, '
            f'{passes:.3g} passes; {run.updates} updates each, of {self.config.train.batch_size} answers{cut}'
        )

    def _show_example(self, run) -> None:
        """There is none before the policy has written one."""
