//! The part of Go's templates that the chart is written in.
//!
//! Enters: a template's text, and values. Leaves: text, as Helm would write it. What is not in this part is an error, and so is a
//! name without a value: the chart must mean one thing, whoever renders it. There are `if`, `else`, `range`, `define`, `template`,
//! comments, pipelines, trimming, and the functions of [`call`]; no variables, so that a template is read from top to bottom.

mod parse;

use std::collections::BTreeMap;

use serde_json::Value;

use self::parse::{Node, Term};

/// Templates that are parsed.
#[derive(Debug, Default)]
pub(super) struct Templates {
    defined: BTreeMap<String, Vec<Node>>,
}

/// Why a template cannot be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template is not written in the part that is understood.
    #[error("line {line}: {why}")]
    Syntax {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// A name has no value.
    #[error("`{0}` has no value")]
    Missing(String),
    /// A function is not known, or not for these arguments.
    #[error("`{0}` is no function of these arguments")]
    Call(String),
    /// A template is used that nobody defined.
    #[error("no template is called `{0}`")]
    Undefined(String),
}

/// What names mean where a template is evaluated.
#[derive(Clone, Copy)]
struct Scope<'a> {
    /// What `$` is.
    root: &'a Value,
    /// What `.` is.
    dot: &'a Value,
}

impl Templates {
    /// Takes over what `text` defines, and renders the rest of it.
    ///
    /// # Errors
    /// [`TemplateError`], the first one from the top.
    pub(super) fn render(&mut self, text: &str, values: &Value) -> Result<String, TemplateError> {
        let nodes = parse::parse(text, &mut self.defined)?;
        let mut output = String::with_capacity(text.len());
        self.write(&nodes, Scope { root: values, dot: values }, &mut output)?;
        Ok(output)
    }

    fn write(&self, nodes: &[Node], scope: Scope<'_>, output: &mut String) -> Result<(), TemplateError> {
        for node in nodes {
            match node {
                Node::Text(text) => output.push_str(text),
                Node::Output(term) => output.push_str(&plain(&evaluate(term, scope)?)),
                Node::If(cases) => {
                    for (condition, nodes) in cases {
                        if condition.as_ref().map_or(Ok(true), |term| evaluate(term, scope).map(|value| truth(&value)))? {
                            self.write(nodes, scope, output)?;
                            break;
                        }
                    }
                }
                Node::Range(list, nodes) => {
                    let list = evaluate(list, scope)?;
                    let items = list.as_array().ok_or_else(|| TemplateError::Call("range".to_owned()))?;
                    for dot in items {
                        self.write(nodes, Scope { dot, ..scope }, output)?;
                    }
                }
                Node::Template(name, dot) => {
                    let nodes = self.defined.get(name).ok_or_else(|| TemplateError::Undefined(name.clone()))?;
                    let dot = evaluate(dot, scope)?;
                    self.write(nodes, Scope { root: &dot, dot: &dot }, output)?;
                }
            }
        }
        Ok(())
    }
}

fn evaluate(term: &Term, scope: Scope<'_>) -> Result<Value, TemplateError> {
    match term {
        Term::Literal(value) => Ok(value.clone()),
        Term::Path { from_root, names } => {
            let start = if *from_root { scope.root } else { scope.dot };
            look_up(start, names).cloned()
        }
        Term::Method { names, argument } => {
            let list = look_up(scope.root, names)?;
            let wanted = evaluate(argument, scope)?;
            let items = list.as_array().ok_or_else(|| TemplateError::Call("Has".to_owned()))?;
            Ok(items.contains(&wanted).into())
        }
        Term::Call { name, arguments } => {
            let values = arguments.iter().map(|term| evaluate(term, scope)).collect::<Result<Vec<_>, _>>()?;
            call(name, &values)
        }
    }
}

fn look_up<'a>(start: &'a Value, names: &[String]) -> Result<&'a Value, TemplateError> {
    let found = names.iter().try_fold(start, |value, name| value.get(name));
    found.ok_or_else(|| TemplateError::Missing(format!(".{}", names.join("."))))
}

/// The functions: Go's own, and Helm's where the chart needs them.
fn call(name: &str, arguments: &[Value]) -> Result<Value, TemplateError> {
    Ok(match (name, arguments) {
        ("not", [value]) => (!truth(value)).into(),
        ("and", [first, second]) => if truth(first) { second } else { first }.clone(),
        ("or", [first, second]) => if truth(first) { first } else { second }.clone(),
        ("eq", [first, second]) => (first == second).into(),
        ("default", [otherwise, value]) => if truth(value) { value } else { otherwise }.clone(),
        ("quote", [value]) => Value::String(plain(value)).to_string().into(),
        ("toYaml", [value]) => yaml(value)?.into(),
        ("nindent", [Value::Number(width), Value::String(text)]) => {
            let width = width.as_u64().and_then(|width| usize::try_from(width).ok()).unwrap_or_default();
            let margin = " ".repeat(width);
            text.lines().map(|line| format!("\n{margin}{line}")).collect::<String>().into()
        }
        _ => return Err(TemplateError::Call(name.to_owned())),
    })
}

fn yaml(value: &Value) -> Result<String, TemplateError> {
    let text = serde_yaml_ng::to_string(value).map_err(|_not_yaml| TemplateError::Call("toYaml".to_owned()))?;
    Ok(text.trim_end().to_owned())
}

/// Whether Go takes a value for true: what is not empty.
fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(is) => *is,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

/// A value as it is written without quotes.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(text: &str) -> Result<String, TemplateError> {
        let values = json!({
            "Values": {"name": "a", "empty": "", "on": true, "off": false, "two": 2, "list": ["x", "y"], "map": {"b": [1], "a": "1"}},
            "Capabilities": {"APIVersions": ["v1", "policy/v1"]},
        });
        Templates::default().render(text, &values)
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        assert_eq!(render(text).as_deref(), Ok(expected), "{text}");
    }

    #[test]
    fn values_are_written_as_helm_writes_them() {
        check("a: {{ .Values.name }}{{ .Values.two }}", "a: a2");
        check("{{ .Values.name | quote }} {{ quote .Values.two }}", r#""a" "2""#);
        check("{{ .Values.empty | default .Values.name }}", "a");
        check("x:{{ toYaml .Values.map | nindent 2 }}", "x:\n  a: '1'\n  b:\n  - 1");
        check("{{/* not\nshown */}}b", "b");
    }

    #[test]
    fn trimming_takes_all_white_space_up_to_the_text() {
        check("a \n {{- .Values.name }} b", "aa b");
        check("a {{ .Values.name -}} \n b", "a ab");
        check("a\n{{- if .Values.off }}\nb\n{{- end }}\nc", "a\nc");
    }

    #[test]
    fn the_first_true_case_is_rendered() {
        check("{{ if .Values.off }}1{{ else if .Values.on }}2{{ else }}3{{ end }}", "2");
        check("{{ if .Values.empty }}1{{ else if .Values.off }}2{{ else }}3{{ end }}", "3");
        check("{{ if and .Values.on (not .Values.off) }}1{{ end }}", "1");
        check("{{ if or .Values.off (eq .Values.name \"a\") }}1{{ end }}", "1");
        check("{{ if .Capabilities.APIVersions.Has \"policy/v1\" }}1{{ end }}", "1");
        check("{{ if not (.Capabilities.APIVersions.Has \"policy/v2\") }}1{{ end }}", "1");
    }

    #[test]
    fn a_range_has_its_own_dot_and_the_same_root() {
        check("{{ range .Values.list }}{{ . }}{{ $.Values.name }} {{ end }}", "xa ya ");
    }

    #[test]
    fn a_defined_template_is_written_where_it_is_used() {
        check("{{- define \"t\" }}<{{ .name }}>{{ end }}{{ template \"t\" .Values }}", "<a>");
        assert_eq!(render("{{ template \"t\" . }}"), Err(TemplateError::Undefined("t".to_owned())));
    }

    #[test]
    fn what_is_not_understood_is_an_error_and_never_text() {
        let missing = |name: &str| Err(TemplateError::Missing(name.to_owned()));
        assert_eq!(render("{{ .Values.nmae }}"), missing(".Values.nmae"));
        assert_eq!(render("{{ upper .Values.name }}"), Err(TemplateError::Call("upper".to_owned())));
        for text in [
            "{{ if .Values.on }}",
            "{{ end }}",
            "{{ $x := 1 }}",
            "{{ .Values.name",
            "{{ with .Values }}{{ end }}",
            "{{ (1 }}",
            "{{ }}",
        ] {
            assert!(matches!(render(text), Err(TemplateError::Syntax { .. })), "{text}: {:?}", render(text));
        }
        assert_eq!(
            render("a\n{{ if . }}\n{{ else }}\n{{ else }}{{ end }}").map_err(|error| error.to_string()),
            Err("line 4: `else` without an open `if`".to_owned())
        );
    }
}
