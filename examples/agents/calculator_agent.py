"""An agent with a tool, trained with GRPO: `python examples/agents/calculator_agent.py`.

The agent is plain code against the chat API: it offers a tool, runs what the policy calls, and returns its reward. It
knows nothing of training. The model here is tiny and untrained, so the reward pays for what such a model can learn
in a minute: to say a number. With a model that calls tools, set `MODEL` and pay for the right answer alone.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import nemo_rl
from nemo_rl_plugins_env_agent import agent_environment

MODEL = "scratch:qwen2-tiny"
TEMPLATE = (
    "{% for t in tools or [] %}<|system|>{{ t.function.name }}<|end|>{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


def chat(base_url: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """One call; any client with a base URL does as well."""
    body = json.dumps({"model": "policy", "messages": messages, "tools": [ADD], "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{base_url}/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]


def calculator(base_url: str, prompt: str, answer: str) -> float:
    """Two turns: what the policy says, what the tool or the user answers, what it says then."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    reward = 0.0
    for _ in range(2):
        message = chat(base_url, messages)
        messages.append(message)
        for call in message.get("tool_calls") or ():
            numbers = json.loads(call["function"]["arguments"])
            result = str(sum(float(value) for value in numbers.values()))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if not message.get("tool_calls"):
            messages.append({"role": "user", "content": "sure?"})
        said = message["content"] or ""
        reward += 0.25 * any(c.isdigit() for c in said) + 0.25 * (said.strip() == answer)
    return reward


def main(run_dir: Path = Path("runs/calculator_agent"), steps: int = 20) -> Any:
    """Train on sums of two digits."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    trainer = nemo_rl.GRPOTrainer(
        {
            "model": MODEL,
            "learning_rate": 1e-2,
            "max_steps": steps,
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 4,
            "run_dir": str(run_dir),
            "policy": {"max_sequence_length": 64},
            "data": {"chat_template": TEMPLATE},
            "generation": {"max_new_tokens": 4},
            "rollouts": {"max_turns": 2},
        }
    )
    return trainer.fit(rows, environment=agent_environment(calculator, timeout_s=60))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
