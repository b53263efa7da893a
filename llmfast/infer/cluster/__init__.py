"""Files of prompts or texts over the processes of a cluster, with Ray; see docs/scale.md."""
