"""Tasks of EleutherAI's lm-evaluation-harness, answered by llmfast's engine; lm_eval is imported in here only."""
