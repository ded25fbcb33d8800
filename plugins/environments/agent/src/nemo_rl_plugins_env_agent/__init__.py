"""Any agent that takes a base URL as an environment of NeMo RL: its model calls become the rollouts."""

from nemo_rl_plugins_env_agent.calls import AgentCall, AgentFailed
from nemo_rl_plugins_env_agent.environment import AgentConfig, AgentEnvironment, agent_environment, register_agent

__all__ = ["AgentCall", "AgentConfig", "AgentEnvironment", "AgentFailed", "agent_environment", "register_agent"]
