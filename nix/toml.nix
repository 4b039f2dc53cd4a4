# Renders an attribute set as the TOML that the program reads: strings, integers and booleans are
# values, sets are tables, lists of sets are arrays of tables, of which an empty one is not written.
with builtins;
let
  # A JSON string is a TOML basic string, but for the one control character that JSON leaves raw.
  text = value: replaceStrings [ (fromJSON ''"\u007f"'') ] [ "\\u007f" ] (toJSON value);

  key = name: if match "[A-Za-z0-9_-]+" name != null then name else text name;

  inline =
    value:
    if isString value then
      text value
    else if isBool value || isInt value then
      toJSON value
    else
      throw "toml.nix: the configuration has no values like ${toJSON value}";

  isTables = value: isList value && all isAttrs value;

  # The lines of a table: its values, then the tables in it, each below a header with its whole path.
  table =
    path: attrs:
    let
      below = name: path ++ [ (key name) ];
      header = name: concatStringsSep "." (below name);
      tables = filter (name: isAttrs attrs.${name}) (attrNames attrs);
      arrays = filter (name: isTables attrs.${name}) (attrNames attrs);
      values = filter (name: !isAttrs attrs.${name} && !isTables attrs.${name}) (attrNames attrs);
    in
    map (name: "${key name} = ${inline attrs.${name}}") values
    ++ concatMap (name: [ "" "[${header name}]" ] ++ table (below name) attrs.${name}) tables
    ++ concatMap (
      name: concatMap (element: [ "" "[[${header name}]]" ] ++ table (below name) element) attrs.${name}
    ) arrays;

  dropBlank = lines: if lines != [ ] && head lines == "" then tail lines else lines;
in
{
  # An attribute set as a TOML document that ends in a newline.
  render = attrs: concatStringsSep "" (map (line: line + "\n") (dropBlank (table [ ] attrs)));
}
