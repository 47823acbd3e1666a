// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"strings"
	"testing"
)

// The shapes stand between two lines of docs/json.md.
const (
	shapesBegin = "<!-- Written by UPDATE=1 go test -run TestShapesAreDocumented ./pkg/admin -->\n"
	shapesEnd   = "<!-- End of the shapes. -->\n"
)

// TestShapesAreDocumented compares the document with the types. With UPDATE=1 in the environment it writes it.
func TestShapesAreDocumented(t *testing.T) {
	const doc = "../../docs/json.md"
	b, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, began := strings.Cut(string(b), shapesBegin)
	has, after, ended := strings.Cut(rest, shapesEnd)
	if !began || !ended {
		t.Fatalf("%s lacks the lines around the shapes", doc)
	}
	want := shapes(t)
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(doc, []byte(before+shapesBegin+want+shapesEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if has != want {
		t.Errorf("%s does not have the shapes as they are; run the line that stands in it", doc)
	}
}

// shapes describes each type that has JSON names, in the order of the sources.
func shapes(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, file := range []string{"data.go", "calls.go", "why.go", "../health/requirement.go"} {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.TYPE {
				continue
			}
			spec := g.Specs[0].(*ast.TypeSpec)
			if s, ok := spec.Type.(*ast.StructType); ok {
				all.WriteString(shape(spec.Name.Name, oneLine(g.Doc), s))
			}
		}
	}
	return all.String()
}

// shape describes a type, or is empty if its fields have no JSON names.
func shape(name, about string, s *ast.StructType) string {
	var rows strings.Builder
	for _, f := range s.Fields.List {
		if f.Tag == nil {
			continue
		}
		tag := reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("json")
		json, omit, _ := strings.Cut(tag, ",")
		means := strings.TrimSpace(oneLine(f.Doc) + " " + oneLine(f.Comment))
		if omit != "" {
			means = strings.TrimSuffix("may be missing; "+means, "; ")
		}
		fmt.Fprintf(&rows, "| `%s` | %s | %s |\n", json, jsonType(f.Type), strings.ReplaceAll(means, "|", `\|`))
	}
	if rows.Len() == 0 {
		return ""
	}
	return fmt.Sprintf("\n## %s\n\n%s\n\n| field | type | meaning |\n|---|---|---|\n%s", name, about, &rows)
}

// jsonType is the type that JSON has for a Go type.
func jsonType(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return jsonType(e.X)
	case *ast.ArrayType:
		return "list of " + jsonType(e.Elt)
	case *ast.MapType:
		return "object of " + jsonType(e.Value)
	case *ast.SelectorExpr:
		if e.Sel.Name == "Time" {
			return "time"
		}
		return jsonType(e.Sel)
	}
	switch name := e.(*ast.Ident).Name; name {
	case "int", "int64":
		return "integer"
	case "float64":
		return "number"
	case "bool":
		return "boolean"
	case "string", "State", "Cause":
		return "string"
	default:
		return fmt.Sprintf("[%s](#%s)", name, strings.ToLower(name))
	}
}

func oneLine(g *ast.CommentGroup) string {
	if g == nil {
		return ""
	}
	return strings.Join(strings.Fields(g.Text()), " ")
}
