"""The scheduler's numbers for others."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Numbers for logs and metrics. The totals count since the start, prompts when their request ends."""

    num_running: int
    num_waiting: int
    num_used_tokens: int  # held by requests, in whole pages
    num_cached_tokens: int  # kept for reuse only
    max_total_tokens: int
    total_prompt_tokens: int
    total_cached_tokens: int  # of the prompt tokens
    total_generated_tokens: int
    total_retractions: int
    total_preemptions: int  # of the retractions: for a higher priority
    total_requests: int
    total_finished: int
    total_aborted: int
    total_refused: int
    total_steps: int
    total_mixed_steps: int  # with decode rows and prompt tokens
    total_evicted_pages: int
    decode_step_seconds: float  # of late
    mixed_step_tokens: int  # prompt tokens that a mixed step may have, where streams set the pace; 0: not known
