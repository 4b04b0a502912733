import pytest, signal, chat_rl
def main(base, *flags) -> int:
    """Runs chat_rl.py in this process; its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        try:
            return chat_rl.main([str(flag) for flag in flags])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def untimed(line: dict) -> dict:
    """A line of metrics.jsonl without what depends on the clock."""
    return {key: x for key, x in line.items() if key not in ("tokens_per_second", "rollout_seconds", "update_seconds")}
