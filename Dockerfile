# One image for both agents: `kvlink sender` and `kvlink receiver`.
ARG BASE=python:3.11-slim
FROM ${BASE}

WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY kvlink ./kvlink
COPY services ./services

# PIP_OPTIONS: where to find wheels, such as an index with CPU builds of torch.
ARG PIP_OPTIONS=""
RUN pip install --no-cache-dir ${PIP_OPTIONS} "$(grep '^torch==' constraints.txt)" \
 && pip install --no-cache-dir ${PIP_OPTIONS} -c constraints.txt .

RUN useradd --create-home kvlink
USER kvlink
ENV KVLINK_CACHE_DIR=/tmp/kvlink

ENTRYPOINT ["kvlink"]
CMD ["--help"]
