# Renders Nix values as block-style YAML. YAML 1.1 readers (kubectl's) and 1.2 ones read it alike,
# since a scalar that either might take for something else is written as a JSON string.
let
  inherit (builtins)
    all
    attrNames
    concatMap
    concatStringsSep
    elem
    elemAt
    filter
    fromJSON
    genList
    head
    isAttrs
    isList
    isString
    length
    match
    replaceStrings
    split
    stringLength
    substring
    tail
    toJSON
    ;

  # Keys that readers of Kubernetes objects expect first; the others follow in alphabetical order.
  first = [
    "apiVersion"
    "kind"
    "metadata"
    "name"
    "namespace"
    "image"
    "imagePullPolicy"
  ];
  keys = attrs: filter (k: attrs ? ${k}) first ++ filter (k: !elem k first) (attrNames attrs);

  # Code points that JSON strings may hold raw, but that YAML calls unprintable or a line break.
  unprintable = [
    "007f"
    "2028"
    "2029"
    "feff"
    "fffe"
    "ffff"
  ]
  ++ concatMap (row: genList (i: "00${row}${substring i 1 "0123456789abcdef"}") 16) [
    "8"
    "9"
  ];
  escape = replaceStrings (map (u: fromJSON ''"\u${u}"'') unprintable) (map (u: "\\u${u}") unprintable);

  # Words that some reader takes for a boolean or a null.
  reserved = "[Yy]|[Yy][Ee][Ss]|[Nn]|[Nn][Oo]|[Oo][Nn]|[Oo][Ff][Ff]|[Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]|[Nn][Uu][Ll][Ll]";
  word = "[A-Za-z/]([A-Za-z0-9_./@=-]|:[A-Za-z0-9_/])*";
  quantity = "[0-9]+(m|[KMG]iB?)";
  # The regex engine recurses with each character: a long string is not tried, and so quoted.
  isPlain =
    text:
    stringLength text < 200
    && match "${word}|${quantity}" text != null
    && match reserved text == null;
  scalar =
    value: if isString value && isPlain value then value else escape (toJSON value);

  # A text of several lines is a literal block, unless it needs an escape, hides its indentation, or
  # has blanks at the end of lines, which editors like to drop.
  linesOf = text: filter isString (split "\n" text);
  init = list: genList (elemAt list) (length list - 1);
  end = n: text: if stringLength text < n then text else substring (stringLength text - n) n text;
  isClean = line: end 1 line != " " && split "[[:cntrl:]]" line == [ line ];
  isBlock =
    text:
    let
      lines = linesOf text;
    in
    length lines > 1
    && !elem (substring 0 1 text) [
      " "
      "\n"
    ]
    && end 2 text != "\n\n"
    && all isClean lines
    && escape text == text;

  # A value is what stands behind a key's colon or a list's dash, and the lines below that, yet to be
  # indented. A collection has nothing behind the colon.
  node =
    value:
    if isAttrs value && value != { } then
      {
        inline = "";
        below = concatMap (k: entry (scalar k) (node value.${k})) (keys value);
      }
    else if isList value && value != [ ] then
      {
        inline = "";
        below = concatMap (v: item (node v)) value;
      }
    else if isString value && isBlock value then
      if end 1 value == "\n" then
        {
          inline = "|";
          below = init (linesOf value);
        }
      else
        {
          inline = "|-";
          below = linesOf value;
        }
    else
      {
        inline = scalar value;
        below = [ ];
      };

  indent = map (line: if line == "" then "" else "  ${line}");
  entry =
    key:
    { inline, below }:
    [ (if inline == "" then "${key}:" else "${key}: ${inline}") ] ++ indent below;
  item =
    { inline, below }:
    if inline == "" then
      [ "- ${head below}" ] ++ indent (tail below)
    else
      [ "- ${inline}" ] ++ indent below;
  document = { inline, below }: if inline == "" then below else [ inline ] ++ indent below;
in
{
  # Renders one value as a YAML document that ends in a newline.
  render = value: concatStringsSep "" (map (line: line + "\n") (document (node value)));
}
