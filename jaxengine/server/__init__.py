"""The HTTP server: OpenAI's routes and vLLM's, over an AsyncLLM. It needs `pip install 'jaxengine[server]'`."""
