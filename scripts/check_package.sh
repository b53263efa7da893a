#!/usr/bin/env bash
# Build wheel and sdist twice, compare the bytes, look into them, install the wheel in a fresh environment and run it,
# and ask for known vulnerabilities: ./scripts/check_package.sh [FOLDER]. Needs the network for the last two.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
python3 -m venv "$folder/build"
"$folder/build/bin/python" -m pip install --quiet --disable-pip-version-check build pip-audit
for number in 1 2; do
    mkdir "$folder/source-$number"
    git archive HEAD | tar x -C "$folder/source-$number"
    touch -d "@$number" "$folder/source-$number/README.md" # what a build must not depend on
    "$folder/build/bin/python" -m build --outdir "$folder/dist-$number" "$folder/source-$number" >"$folder/build-$number.log"
done
for file in "$folder"/dist-1/*; do
    cmp "$file" "$folder/dist-2/${file##*/}"
    sha256sum "$file"
done
echo "wheel and sdist: the same bytes twice"

"$folder/build/bin/python" - "$folder"/dist-1/*.whl "$folder"/dist-1/*.tar.gz <<'EOF'
import subprocess
import sys
import tarfile
import zipfile

wheel = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
sdist = {name.partition("/")[2] for name in tarfile.open(sys.argv[2]).getnames()}
tracked = set(subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split("\n")) - {""}
package = {name for name in tracked if name.startswith("llmfast/")}
assert wheel == package, wheel ^ package
assert sdist <= tracked | {"PKG-INFO"}, sdist - tracked
assert package <= sdist, package - sdist
print(f"wheel: the {len(wheel)} files of the package; sdist: {len(sdist)} files, all of them tracked")
EOF

python3 -m venv "$folder/fresh"
"$folder/fresh/bin/python" -m pip install --quiet --disable-pip-version-check "$(echo "$folder"/dist-1/*.whl)[cpu]"
cd "$folder"
fresh/bin/llmfast --version
fresh/bin/llmfast doctor >doctor.txt
fresh/bin/llmfast quantize --list >methods.txt
echo "the wheel runs in a fresh environment"
build/bin/pip-audit --path "$(echo fresh/lib/python3*/site-packages)" --progress-spinner off --format json >audit.json
build/bin/python - audit.json <<'EOF'
import json
import sys

found = json.load(open(sys.argv[1]))["dependencies"]
skipped = [one["name"] for one in found if "skip_reason" in one]
print(f"pip-audit: {len(found) - len(skipped)} of {len(found)} packages were looked up, and have no known vulnerability")
if len(skipped) > 1:  # llmfast itself is on no index
    sys.exit(f"nothing is known of {', '.join(skipped)}: is the index's JSON API within reach?")
EOF
