# What `nix run .#NAME` runs, besides the proxy itself.
{
  pkgs,
  # This system's packages of the flake.
  packages,
}:
let
  inherit (pkgs) lib runCommand writeShellApplication;

  go = packages.default.go;
  version = packages.default.version;
  reference = "${packages.default.pname}:${version}";

  # kind and crane read uncompressed archives only.
  archive = image: runCommand "image.tar" { } "gzip -dc ${image} >$out";
in
{
  generate = writeShellApplication {
    name = "generate";
    meta.description = "Write k8s/ and nix/vendor-hash, which are made from other files of the tree";
    runtimeInputs = [ go ];
    text = ''
      [ -f nix/manifests.nix ] || { echo "generate: run it in the project's root" >&2; exit 2; }

      rm -rf k8s
      cp -r --no-preserve=mode ${packages.manifests} k8s

      # What buildGoModule does to get the modules whose hash it then wants to know.
      tmp=$(mktemp -d)
      trap 'rm -rf "$tmp"' EXIT
      GOFLAGS="" GOWORK=off GOTOOLCHAIN=local go mod vendor -o "$tmp/vendor"
      nix --extra-experimental-features nix-command hash path "$tmp/vendor" >nix/vendor-hash
    '';
  };
}
// lib.optionalAttrs pkgs.stdenv.hostPlatform.isLinux {
  load = writeShellApplication {
    name = "load";
    meta.description = "Load the image into docker, podman, kind or minikube, without a registry";
    text = ''
      have() { command -v "$1" >/dev/null; }

      # Where a cluster runs, its nodes need the image; elsewhere the local daemon does.
      choose() {
        if have kind && [ -n "$(kind get clusters 2>/dev/null)" ]; then echo kind
        elif have minikube && minikube status >/dev/null 2>&1; then echo minikube
        elif have docker; then echo docker
        elif have podman; then echo podman
        else
          echo "load: none of kind (with a cluster), minikube (running), docker and podman is here" >&2
          return 1
        fi
      }

      case ''${1:-} in
        -h | --help) echo "usage: load [docker|podman|kind|minikube [OPTIONS OF ITS LOAD COMMAND]]"; exit ;;
      esac
      target=''${1:-$(choose)}
      shift $(($# > 0))

      archive=${archive packages.image}
      case $target in
        docker | podman) "$target" load --input "$archive" "$@" ;;
        kind) kind load image-archive "$archive" "$@" ;;
        minikube) minikube image load "$archive" "$@" ;;
        *) echo "load: $target? one of docker, podman, kind, minikube" >&2; exit 2 ;;
      esac
      echo "load: ${reference} is in $target"
    '';
  };

  push = writeShellApplication {
    name = "push";
    meta.description = "Push the images of both architectures and an index of them to a registry";
    runtimeInputs = [ pkgs.crane ];
    text = ''
      case ''${1:-} in
        "" | -h | --help)
          echo "usage: push REGISTRY/NAME[:TAG] [OPTIONS OF CRANE]"
          echo "TAG is ${version} unless given. Log in first: crane auth login REGISTRY (or docker login)."
          exit 2
          ;;
      esac
      name=$1 tag=${version}
      case ''${name##*/} in
        *:*) tag=''${name##*:} name=''${name%:*} ;;
      esac
      shift

      crane push "$@" ${archive packages.image-amd64} "$name:$tag-amd64"
      crane push "$@" ${archive packages.image-arm64} "$name:$tag-arm64"
      crane index append "$@" --tag "$name:$tag" --manifest "$name:$tag-amd64" --manifest "$name:$tag-arm64"

      echo "Pin it by its digest:"
      echo "$name@$(crane digest "$@" "$name:$tag")"
    '';
  };
}
