{
  description = "Anthropic API proxy on a tailnet that adds the OAuth beta header";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      # The full hash of a clean tree's commit, marked if the tree was changed; "" outside of git.
      revision = self.rev or self.dirtyRev or "";

      # Of our systems, those that this nixpkgs has.
      systems = lib.intersectLists lib.systems.flakeExposed [
        "x86_64-linux"
        "aarch64-linux"
        "x86_64-darwin"
        "aarch64-darwin"
      ];
      eachSystem = f: lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system});
      own = pkgs: self.packages.${pkgs.stdenv.hostPlatform.system};

      package =
        pkgs: args:
        pkgs.callPackage ./nix/package.nix (
          {
            buildGoModule = import ./nix/go.nix pkgs;
            inherit revision;
          }
          // args
        );

      # The image of one architecture; only another one than the platform's is cross-compiled.
      image =
        pkgs: goarch:
        pkgs.callPackage ./nix/image.nix {
          inherit goarch revision;
          package =
            if goarch == pkgs.stdenv.hostPlatform.go.GOARCH then
              (own pkgs).default
            else
              package pkgs { inherit goarch; };
        };
    in
    {
      packages = eachSystem (
        pkgs:
        {
          default = package pkgs { };
          manifests = self.lib.writeManifests pkgs (self.lib.manifests { });
        }
        // lib.optionalAttrs pkgs.stdenv.hostPlatform.isLinux {
          image = image pkgs pkgs.stdenv.hostPlatform.go.GOARCH;
          image-amd64 = image pkgs "amd64";
          image-arm64 = image pkgs "arm64";
        }
      );

      apps = eachSystem (
        pkgs:
        lib.mapAttrs (_: program: {
          type = "app";
          program = lib.getExe program;
          meta.description = program.meta.description;
        }) (
          { inherit (own pkgs) default; }
          // import ./nix/apps.nix {
            inherit pkgs;
            packages = own pkgs;
          }
        )
      );

      checks = eachSystem (
        pkgs:
        import ./nix/checks.nix {
          inherit pkgs revision;
          packages = own pkgs;
          nixosModule = self.nixosModules.default;
        }
      );

      devShells = eachSystem (pkgs: {
        default = pkgs.mkShell {
          inputsFrom = [ (own pkgs).default ];
          packages = [
            pkgs.crane
            pkgs.gopls
            pkgs.gotools
            pkgs.jq
            pkgs.kubeconform
            pkgs.kubectl
            pkgs.shellcheck
          ];
        };
      });

      formatter = eachSystem (pkgs: pkgs.nixfmt-tree or pkgs.nixfmt);

      # pkgs.anthropic-oauth-proxy.
      overlays.default = final: _: { anthropic-oauth-proxy = package final { }; };

      nixosModules.default = import ./nix/nixos-module.nix self;

      lib = {
        # Settings (the arguments of nix/manifests.nix) to { "path below k8s/" = text; }.
        manifests = import ./nix/manifests.nix { inherit lib; };

        # Those texts as a folder for `kubectl apply -k`.
        writeManifests =
          pkgs: files:
          pkgs.runCommand "manifests" { } (
            lib.concatStrings (
              lib.mapAttrsToList (path: text: ''
                install -Dm644 ${pkgs.writeText (baseNameOf path) text} $out/${path}
              '') files
            )
          );
      };
    };
}
