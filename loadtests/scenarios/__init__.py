"""One question each: `QUESTION`, and `run(bench)` that answers it with figures and judged goals."""
