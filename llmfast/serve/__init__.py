"""An HTTP server over a bundle, with the API that clients of OpenAI's speak."""
