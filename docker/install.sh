#!/bin/sh
# install.sh ARGUMENTS OF "uv pip install"…: fill /opt/venv with what requirements.lock pins, checked by its hashes.
# Run while an image is built, in the folder of requirements.lock.
set -eu
uv_lock=$(mktemp) tool=$(mktemp -d)
sed -n '/^uv==/,/[^\\]$/p' requirements.lock >"$uv_lock"
python -m venv "$tool"
"$tool/bin/pip" install --quiet --no-cache-dir --require-hashes -r "$uv_lock"
[ -d /opt/venv ] || python -m venv --without-pip /opt/venv
"$tool/bin/uv" pip install --python /opt/venv/bin/python --no-cache --no-build --compile-bytecode \
  --constraint requirements.lock "$@"
# What no hash was checked for does not get in.
"$tool/bin/uv" pip freeze --python /opt/venv/bin/python | while read -r package; do
  grep -Eq "^${package%%==*}(\[[^]]*\])?==${package#*==} " requirements.lock || { echo "$package is not in requirements.lock" >&2; exit 1; }
done
rm -rf "$uv_lock" "$tool"
