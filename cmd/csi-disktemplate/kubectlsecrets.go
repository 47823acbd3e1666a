// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"regexp"
	"slices"
	"strings"
)

// removed stands where something was that looked like a secret.
const removed = "[removed]"

// scrubbed takes out what looks like a secret: by its own form, in front of the host of a URL, or by the name that it is
// given. It takes out too much rather than too little. But whoever writes something that looks like a secret loses the
// line or the string that it is in at most: nobody can hide what others wrote. JSON stays JSON.
func scrubbed(text []byte) []byte {
	if json.Valid(text) {
		return scrubbedJSON(text)
	}
	for _, form := range knownForms {
		text = form.ReplaceAllLiteral(text, []byte(removed))
	}
	text = scheme.ReplaceAll(text, []byte("${1}"+removed))
	text = address.ReplaceAllFunc(text, withoutUser)
	return withoutValues(text)
}

// knownForms are the secrets that are known by how they begin. A pattern that begins with plain letters is found fast.
var knownForms = []*regexp.Regexp{
	// A private key in PEM: its lines may have the times of a log before them, or stand in a string with \n between them.
	// If its end is missing, it has as many lines as look like those of a key.
	regexp.MustCompile(`-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----` +
		`(?:` + keyBreak + `(?:[A-Za-z0-9+/=]{20,}|(?:Proc-Type|DEK-Info): [^\s"\\]+))*` +
		`(?:(?:` + keyBreak + `[A-Za-z0-9+/=]+)*` + keyBreak + `-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----)?`),
	// JSON Web Tokens, and tokens that begin with a mark of who gives them.
	regexp.MustCompile(`eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?`),
	regexp.MustCompile(`gh[a-z]_\w{8,}`),
	regexp.MustCompile(`github_pat_\w{8,}`),
	regexp.MustCompile(`glpat-[\w-]{8,}`),
	regexp.MustCompile(`xox[a-z]-[\w-]{8,}`),
	regexp.MustCompile(`AGE-SECRET-KEY-\w+`),
}

var (
	scheme  = regexp.MustCompile(`(?i)\b((?:bearer|basic)[ \t]+)[\w.~+/-]{8,}=*`)
	address = regexp.MustCompile(`://[^\s"]+`)
)

// keyBreak stands between two lines of a private key.
const keyBreak = `(?:\s|\\+[nrt])+(?:\d{4}-\d\d-\d\dT[\d:.]+Z[ \t]+)?`

// withoutUser takes out what stands in a URL before the last @: the user information, in which a password may have an @
// or a slash. The digest of an image stands behind an @, too.
func withoutUser(url []byte) []byte {
	for end := len(url); ; {
		end = bytes.LastIndexByte(url[:end], '@')
		if end <= len("://") {
			return url
		}
		if !bytes.HasPrefix(url[end:], []byte("@sha256:")) && !bytes.HasPrefix(url[end:], []byte("@sha512:")) {
			return slices.Concat([]byte("://"+removed), url[end:])
		}
	}
}

var (
	// secretName is the name of a secret. A key alone is none: templates have keys.
	secretName = regexp.MustCompile(`(?i)pass|pwd|secret|token|credential|signature|auth|cookie|` +
		`(?:api|access|account|client|encryption|master|private|shared|signing|ssh|storage)[_.-]?key|` +
		`(?-i:[A-Z0-9]_KEY$|(?:^|[^A-Za-z])(?:SIG|[Ss]ig)(?:$|[^a-z])|[a-z]Sig(?:$|[^a-z]))`)
	// plainName is the name of something about a secret, or of what only sounds like one. --content-credentials is the
	// plugin's, and names a directory.
	plainName = regexp.MustCompile(`(?i)(?:^--content-credentials|names?|namespaces?|seconds|expiration|files?|paths?|dirs?|types?|kinds?|refs?|authority|author)$`)
	// severalWords is the name of a secret that has several words, as "Authorization: Bearer TOKEN".
	severalWords = regexp.MustCompile(`(?i)(?:authorization|cookie)$`)
	// plainValue is no secret: it says where one is, or whether there is one.
	plainValue = regexp.MustCompile(`^(?:\[removed\]|<set to the key '|<none>|<unset>|<nil>|\{|(?:true|false|null|nil)(?:$|[\s,;}\])]))`)

	assignment = regexp.MustCompile(`^[ \t]*(?::=|=>|[:=])[ \t]*`)
	colon      = regexp.MustCompile(`^[ \t]*:[ \t]+$`)
	nextWord   = regexp.MustCompile(`^([ \t]+)[^\s-]`)
	nextString = regexp.MustCompile(`^(\s*,\s*)["'\\]`)
	beginning  = regexp.MustCompile(`(?:^|\n)(?:\d{4}-\d\d-\d\dT\S+ )?[ \t-]*$`) // of a line, perhaps of a log
)

func namesSecret(name []byte) bool {
	return hasWord(name) && secretName.Match(name) && !plainName.Match(name)
}

// words are, by their first letter, in each name of a secret, and in other names. Most names in a log have none, and are
// not compared with the patterns, which is slow.
var words = map[byte][]string{
	'a': {"auth"}, 'c': {"credential", "cookie"}, 'k': {"key"}, 'p': {"pass", "pwd"}, 's': {"secret", "sig"}, 't': {"token"},
}

func hasWord(name []byte) bool {
	for i, c := range name {
		switch c |= 'a' - 'A'; c { // a letter becomes a small one
		case 'a', 'c', 'k', 'p', 's', 't':
			for _, w := range words[c] {
				if len(name)-i >= len(w) && strings.EqualFold(string(name[i:i+len(w)]), w) {
					return true
				}
			}
		}
	}
	return false
}

// withoutValues takes out the values of names that are those of secrets: `name: value`, `name=value`, `"name": "value"`,
// also where the quotes are escaped, and `--name value`.
func withoutValues(text []byte) []byte {
	var out bytes.Buffer
	done := 0 // what stands before is in out
	for at := 0; at < len(text); {
		if !isOfName(text[at]) {
			at++
			continue
		}
		from, to := at, at
		for to < len(text) && isOfName(text[to]) {
			to++
		}
		at = to
		if !namesSecret(text[from:to]) {
			continue
		}
		if begin, length, by := secretValue(text, from, to); length > 0 {
			out.Write(text[done:begin])
			out.WriteString(by)
			at = begin + length
			done = at
		}
	}
	out.Write(text[done:])
	return out.Bytes()
}

func isOfName(c byte) bool {
	return c == '_' || c == '.' || c == '-' || '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z'
}

// secretValue returns where the value of the name text[from:to] begins, how long it is, and what is to stand there. The
// length is 0 if there is no value, or none that is secret.
func secretValue(text []byte, from, to int) (begin, length int, by string) {
	quote := quoteAt(text[to:])
	begin = to + len(quote)
	rest := text[begin:min(len(text), begin+100)] // no more stands before a value
	between := assignment.Find(rest)
	if isFlag := text[from] == '-'; len(between) == 0 && isFlag {
		next := nextWord
		if len(quote) > 0 {
			next = nextString
		}
		if m := next.FindSubmatch(rest); m != nil {
			between = m[1]
		}
	}
	begin += len(between)
	value := text[begin:]
	if len(between) == 0 || len(value) == 0 || plainValue.Match(value[:min(len(value), 20)]) {
		return begin, 0, ""
	}
	toLineEnd := colon.Match(between) && beginning.Match(text[max(0, from-60):from])
	if quote := quoteAt(value); len(quote) > 0 && !toLineEnd {
		if length, closed := stringAt(value, quote); closed {
			return begin, length, string(quote) + removed + string(quote)
		} else if quote[0] != '\'' && quote[0] != '`' { // those may be the first of a word
			return begin, length, string(quote) + removed
		}
	}
	switch {
	case toLineEnd:
		length = until(value, "\r\n")
	case severalWords.Match(text[from:to]):
		length = len(bytes.TrimRight(value[:until(value, "\"\r\n")], `\`))
	case value[0] == '[': // a list, as Go prints it, or JSON does
		length = until(value, "]\r\n")
		if length < len(value) && value[length] == ']' {
			length++
		}
	default:
		length = len(bytes.TrimRight(value[:until(value, "\" \t\r\n")], `\,;`))
	}
	return begin, length, removed
}

// until is where the first of some characters is, or the end.
func until(text []byte, chars string) int {
	if i := bytes.IndexAny(text, chars); i >= 0 {
		return i
	}
	return len(text)
}

// quoteAt returns the quote that a text begins with, and the backslashes before it, or nothing.
func quoteAt(text []byte) []byte {
	n := 0
	for n < len(text) && text[n] == '\\' {
		n++
	}
	if n < len(text) && (text[n] == '"' || n == 0 && (text[n] == '\'' || text[n] == '`')) {
		return text[:n+1]
	}
	return nil
}

// stringAt returns how long the string is that begins with a quote, with its quotes. If nothing closes it, it ends before
// the end of the line, or of the string that it is in.
func stringAt(text, quote []byte) (length int, closed bool) {
	mark, level := quote[len(quote)-1], len(quote)-1
	for i := len(quote); i < len(text) && text[i] != '\n'; i++ {
		if text[i] != mark {
			continue
		}
		escapes := i - len(bytes.TrimRight(text[len(quote):i], `\`)) - len(quote)
		switch {
		case mark != '"':
			return i + 1, true
		case escapes < level: // the string around it ends
			return i - escapes, false
		case escapes%(2*(level+1)) == level: // a quote within has more, and a backslash is two, or four within another string
			return i + 1, true
		}
	}
	return until(text, "\n"), false
}

// scrubbedJSON takes out of JSON the values of names that are those of secrets, and secrets in other strings.
func scrubbedJSON(text []byte) []byte {
	var out bytes.Buffer
	isSecret, isFlag := false, false // what comes is the value of such a name, or stands behind such a flag
	for len(text) > 0 {
		next := until(text, `"-0123456789`)
		out.Write(text[:next])
		if text = text[next:]; len(text) == 0 {
			break
		}
		if text[0] != '"' {
			length := len(text) - len(bytes.TrimLeft(text, "-+.eE0123456789"))
			if isSecret {
				out.WriteString(`"` + removed + `"`)
			} else {
				out.Write(text[:length])
			}
			text = text[length:]
			continue
		}
		length, _ := stringAt(text, text[:1])
		var value string
		_ = json.Unmarshal(text[:length], &value) // the text is valid
		isName := bytes.HasPrefix(bytes.TrimLeft(text[length:], " \t\r\n"), []byte(":"))
		switch by := []byte(value); {
		case isName:
			isSecret, isFlag = namesSecret(by), false
			out.Write(text[:length])
		default:
			if isSecret || isFlag && !strings.HasPrefix(value, "-") {
				by = []byte(removed)
			} else {
				by = scrubbed(by)
			}
			isFlag = strings.HasPrefix(value, "-") && namesSecret(by)
			if string(by) == value {
				out.Write(text[:length])
			} else {
				quoted, _ := json.Marshal(string(by))
				out.Write(quoted)
			}
		}
		text = text[length:]
	}
	return out.Bytes()
}

// ofManifests are the variables that the project's manifests set. Their values are no secrets.
var ofManifests = []string{
	"NODE_NAME", "KUBELET_DIR", "POD_IP", "POD_NAME", "POD_NAMESPACE", "NAMESPACE", "CSI_ENDPOINT", "GOMEMLIMIT", "GOGC", "GOMAXPROCS",
}

// fromElsewhere is the value of a variable that Kubernetes gets from the pod itself, or from a Secret or a ConfigMap,
// whose content is not shown.
var fromElsewhere = regexp.MustCompile(`^(?:\[removed\]|<set to the key '.*|(?:\S+ +)?\(v1:(?:metadata|spec|status)\.\w+\))$`)

// described takes out of what `kubectl describe` prints of pods the values of environment variables, and what stands on
// the line behind a flag that is the name of a secret. Variables of the project's manifests keep theirs.
func described(text []byte) []byte {
	var out bytes.Buffer
	section, inSection, inEntry := "", 0, 0 // its title, and how far it and its entries are indented
	isFlag := false
	for line := range bytes.Lines(text) {
		words := strings.TrimSpace(string(line))
		indent := len(line) - len(bytes.TrimLeft(line, " \t"))
		if words != "" && indent <= inSection {
			section = ""
		}
		switch {
		case section == "":
			if words == "Environment:" || words == "Args:" || words == "Command:" {
				section, inSection, inEntry, isFlag = words, indent, 0, false
			}
		case section == "Environment:":
			if inEntry == 0 {
				inEntry = indent
			}
			if indent > inEntry || words == "" { // the value of the line before goes on
				continue
			}
			name, value, _ := strings.Cut(words, ":")
			value = strings.TrimSpace(value)
			if value != "" && !slices.Contains(ofManifests, name) && !fromElsewhere.MatchString(value) {
				line = slices.Concat(line[:indent], []byte(name+":  "+removed+"\n"))
			}
		default:
			if isFlag && !strings.HasPrefix(words, "-") {
				line = slices.Concat(line[:indent], []byte(removed+"\n"))
			}
			isFlag = strings.HasPrefix(words, "-") && !strings.ContainsAny(words, "= ") && namesSecret([]byte(words))
		}
		out.Write(line)
	}
	return out.Bytes()
}
