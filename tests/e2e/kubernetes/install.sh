#!/usr/bin/env bash
# Builds kube-apiserver 1.20 from Debian bookworm's source package, the newest with a whole server in it, and puts it and
# bookworm's etcd into FOLDER/bin: install.sh FOLDER. Packages come from the mirrors that this machine's apt uses; bookworm's
# lists are kept in FOLDER, so that apt and the machine stay as they are. What cannot be had is said, and is a failure.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="$(realpath -m "$1")"
work="$folder/build" bin="$folder/bin"
gopath="$work/gopath" root="$work/root"
tree="$gopath/src/k8s.io/kubernetes"
rm -rf "$folder"
mkdir -p "$bin" "$work/lists/partial" "$work/cache/archives/partial" "$work/packages" "$root" "$tree"

stop() {
  echo "$*" >&2
  exit 1
}
for program in apt-get dpkg patch; do
  command -v "$program" >/dev/null || stop "there is no $program here: the API server is built from Debian's packages"
done

cat >"$work/apt.conf" <<END
Dir::State::Lists "$work/lists";
Dir::Cache "$work/cache";
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "/dev/null";
APT::Sandbox::User "";
END

# Takes bookworm's lists from a mirror; fails if it does not have them, or not this package's source.
lists_from() {
  local mirror="$1" key="$2" signed=""
  if [ -f "$key" ]; then signed="[signed-by=$key] "; fi
  printf '%s %sbookworm main\n' deb "$signed$mirror " deb-src "$signed$mirror " >"$work/sources.list"
  APT_CONFIG="$work/apt.conf" apt-get update --error-on=any &&
    APT_CONFIG="$work/apt.conf" apt-cache showsrc --only-source kubernetes | grep '^Version: 1\.20' >/dev/null
}
found=""
while [ -z "$found" ] && read -r mirror key; do
  if lists_from "$mirror" "$key" >>"$work/apt.log" 2>&1; then found="$mirror"; fi
done < <(apt-get indextargets --format '$(REPO_URI) $(SIGNED_BY)' 'Created-By: Packages' | grep -E '^(http|file|copy|mirror)' | sort -u)
[ "$found" ] || stop "no mirror in apt's sources has Debian bookworm's source package kubernetes; add one that has it." \
  "$work/apt.log has what the mirrors answered."
export APT_CONFIG="$work/apt.conf"
(
  cd "$work/packages"
  apt-get source --quiet --download-only kubernetes
  apt-get download --quiet golang-1.19-go golang-1.19-src etcd-server
)
for package in "$work"/packages/*.deb; do dpkg -x "$package" "$root"; done
cp "$root/usr/bin/etcd" "$bin"
tar -xzf "$work"/packages/kubernetes_*.orig.tar.gz -C "$tree" --strip-components=1
cd "$tree"
patch --quiet -p1 <"$here/go-1.19.patch"

export GOPATH="$gopath" GOROOT="$root/usr/lib/go-1.19" GOCACHE="${GOCACHE:-$work/go-cache}" GO111MODULE=off CGO_ENABLED=0 GOFLAGS=
go="$GOROOT/bin/go"
echo "building kube-apiserver, once: 4 to 15 minutes on two cores"
"$go" build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
inputs="$(grep -rl --include=*.go '+k8s:openapi-gen=' pkg staging/src/k8s.io | xargs -n1 dirname | sort -u |
  grep -vE '/(code-generator|sample-apiserver)/' | sed -e 's#^staging/src/#vendor/#' -e 's#^#k8s.io/kubernetes/#' | paste -sd,)"
"$work/openapi-gen" --logtostderr -i "$inputs" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
  -h vendor/k8s.io/code-generator/hack/boilerplate.go.txt -r "$work/violations" >/dev/null
version="-s -w"
for package in client-go/pkg/version component-base/version; do
  version+=" -X k8s.io/kubernetes/vendor/k8s.io/$package.gitVersion=v1.20.2"
  version+=" -X k8s.io/kubernetes/vendor/k8s.io/$package.gitMajor=1 -X k8s.io/kubernetes/vendor/k8s.io/$package.gitMinor=20"
done
"$go" build -tags providerless -ldflags "$version" -o "$bin/kube-apiserver" ./cmd/kube-apiserver
cd "$folder"
rm -rf "$work"
touch "$folder/installed"
