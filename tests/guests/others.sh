# shellcheck shell=bash
# The HTTP servers that no Rust made: build.sh reads this. Each toolchain is fetched from its language's own registry, in
# the version that a file beside the source names, into a folder below the outputs; the system has only what Debian
# packages. What comes out is checked before it gets its name.

# JavaScript: componentize-js puts the script into an engine and starts it once, so that a request finds it running.
build_js() {
    local work=$out/.build/js version
    if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
        need_packages "JavaScript and its packages" "install Node.js 18 or later with npm" nodejs npm
    fi
    version=$(node --print 'process.versions.node')
    [ "${version%%.*}" -ge 18 ] || { say "this is Node.js $version, and js.wasm needs 18 or later" && exit 1; }
    say "building js.wasm with Node.js $version"
    mkdir -p "$work"
    cp "$here"/js/* "$work"
    npm ci --prefix "$work" --ignore-scripts --no-audit --no-fund >&2 9>&-
    node "$work/build.mjs" "$here/wit" "$work/js.wasm" >&2 9>&-
    publish "$work/js.wasm"
}

# Python: componentize-py puts CPython and the module into one component. It looks for packages where it runs, and so it
# runs in a copy.
build_py() {
    local work=$out/.build/py
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        need_packages "Python and its environments" "install Python 3.9 or later with venv" python3 python3-venv
    fi
    say "building py.wasm with $(python3 --version)"
    python3 -m venv --clear "$work" >&2 9>&-
    "$work/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary=:all: \
        --requirement "$here/py/requirements.txt" >&2 9>&-
    mkdir -p "$work/app"
    cp "$here/py/server.py" "$work/app"
    (cd "$work/app" && ../bin/componentize-py --quiet -d "$here/wit" -w server componentize server \
        --output "$work/py.wasm") >&2 9>&-
    publish "$work/py.wasm"
}

publish() {
    build_tool
    "$tool" check "$1" >&2
    mv "$1" "$out/${1##*/}"
}
