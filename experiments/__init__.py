"""What is claimed of the networks, and what was run for it; benchmarks/ is about speed."""

from collections.abc import Callable

from runtime.command import cannot_print, run_command


def as_command(
    program: str, work: Callable[[], int | None], interrupted: str = "interrupted"
) -> int:
    """Run a command's `work` as all commands are; the exit code."""

    def explain(error: Exception) -> str | None:
        if isinstance(error, BrokenPipeError):
            return ""  # a reader such as head has seen enough
        return str(error) if isinstance(error, OSError) and not cannot_print(error) else None

    return run_command(program, work, explain, interrupted)
