#!/usr/bin/env bash
# Names what is missing and the Debian command that brings it.
set -u
missing=0
need() { # what, how
  printf 'missing: %s\n  on Debian: %s\n' "$1" "$2" >&2
  missing=1
}

python3.11 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
  need 'Python 3.11 (python3.11 on the PATH)' 'apt-get install python3.11 python3.11-venv python3.11-dev'
python3.11 -c 'import venv, ensurepip' 2>/dev/null ||
  need 'the venv module of Python 3.11' 'apt-get install python3.11-venv'
python3.11 -c 'import pathlib, sysconfig, sys; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' 2>/dev/null ||
  need 'the headers of Python 3.11' 'apt-get install python3.11-dev'

java=${JAVA_HOME:+$JAVA_HOME/bin/}java
version=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
[ "${version:-0}" = 17 ] || need "a JDK 17 (found: ${version:-none})" 'apt-get install openjdk-17-jdk-headless'

command -v c++ >/dev/null 2>&1 || need 'a C++ compiler (c++)' 'apt-get install g++'

exit $missing
