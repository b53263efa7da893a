# An image for CI: every command but those that need PyTorch. Build with another EXTRAS for these:
#   docker build -t llmfast .
#   docker build -t llmfast-export --build-arg EXTRAS=cpu,export .
FROM python:3.12-slim AS build
ARG EXTRAS=cpu,eval,report,serve,vision
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY llmfast ./llmfast
RUN python -m venv /opt/llmfast \
    && /opt/llmfast/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:3.12-slim
COPY --from=build /opt/llmfast /opt/llmfast
ENV PATH=/opt/llmfast/bin:$PATH
RUN useradd --create-home --uid 1000 llmfast
USER 1000
WORKDIR /work
ENTRYPOINT ["llmfast"]
CMD ["--help"]
