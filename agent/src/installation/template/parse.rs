//! Reads a template: text and actions to nodes, actions to terms.

use std::collections::BTreeMap;

use serde_json::Value;

use super::TemplateError;

/// A piece of a template.
#[derive(Clone, Debug)]
pub(super) enum Node {
    /// Text that is written as it is.
    Text(String),
    /// A value that is written.
    Output(Term),
    /// Cases, of which the first true one is written; the one without a condition is true.
    If(Vec<(Option<Term>, Vec<Node>)>),
    /// What is written for each item of a list.
    Range(Term, Vec<Node>),
    /// Another template's text, with what its dot is.
    Template(String, Term),
}

/// What has a value.
#[derive(Clone, Debug)]
pub(super) enum Term {
    /// Itself.
    Literal(Value),
    /// What is found from the dot, or from the root, by these names.
    Path { from_root: bool, names: Vec<String> },
    /// Whether a list, found from the root, has an item: `.Capabilities.APIVersions.Has "policy/v1"`.
    Method { names: Vec<String>, argument: Box<Term> },
    /// A function's result.
    Call { name: String, arguments: Vec<Term> },
}

/// What is open while a template is read.
enum Open {
    If { cases: Vec<(Option<Term>, Vec<Node>)>, condition: Option<Term>, has_else: bool },
    Range(Term),
    Define(String),
}

/// Reads `text`; what it defines is added to `defined`.
pub(super) fn parse(text: &str, defined: &mut BTreeMap<String, Vec<Node>>) -> Result<Vec<Node>, TemplateError> {
    let mut reader = Reader { nodes: Vec::new(), open: Vec::new(), line: 1, defined };
    let mut rest = text;
    let mut trim = false;
    while let Some((before, action)) = rest.split_once("{{") {
        let (inside, after) = action.split_once("}}").ok_or_else(|| reader.wrong("`{{` without `}}`"))?;
        let (inside, trims_before) = inside.strip_prefix("- ").map_or((inside, false), |inside| (inside, true));
        let (inside, trims_after) = inside.strip_suffix(" -").map_or((inside, false), |inside| (inside, true));
        reader.text(before, trim, trims_before);
        reader.action(inside.trim())?;
        reader.line += inside.matches('\n').count();
        (rest, trim) = (after, trims_after);
    }
    reader.text(rest, trim, false);
    if reader.open.is_empty() { Ok(reader.nodes) } else { Err(reader.wrong("an `end` is missing")) }
}

struct Reader<'a> {
    nodes: Vec<Node>,
    /// What is open, each with the nodes that stand before it.
    open: Vec<(Open, Vec<Node>)>,
    line: usize,
    defined: &'a mut BTreeMap<String, Vec<Node>>,
}

impl Reader<'_> {
    fn wrong(&self, why: impl Into<String>) -> TemplateError {
        TemplateError::Syntax { line: self.line, why: why.into() }
    }

    fn text(&mut self, text: &str, trim_start: bool, trim_end: bool) {
        self.line += text.matches('\n').count();
        let text = if trim_start { text.trim_start() } else { text };
        let text = if trim_end { text.trim_end() } else { text };
        if !text.is_empty() {
            self.nodes.push(Node::Text(text.to_owned()));
        }
    }

    fn action(&mut self, action: &str) -> Result<(), TemplateError> {
        if action.starts_with("/*") {
            return if action.ends_with("*/") { Ok(()) } else { Err(self.wrong("a comment without an end")) };
        }
        let (word, rest) = action.split_once(char::is_whitespace).unwrap_or((action, ""));
        match word {
            "if" => {
                let condition = Some(self.pipeline(rest)?);
                self.begin(Open::If { cases: Vec::new(), condition, has_else: false });
            }
            "else" => self.otherwise(rest)?,
            "range" => {
                let list = self.pipeline(rest)?;
                self.begin(Open::Range(list));
            }
            "define" => {
                let name = self.name(rest)?;
                self.begin(Open::Define(name));
            }
            "template" => {
                let (name, dot) = rest.split_once(char::is_whitespace).ok_or_else(|| self.wrong("`template` without a dot"))?;
                let node = Node::Template(self.name(name)?, self.pipeline(dot)?);
                self.nodes.push(node);
            }
            "end" => self.end()?,
            _ => {
                let node = Node::Output(self.pipeline(action)?);
                self.nodes.push(node);
            }
        }
        Ok(())
    }

    fn begin(&mut self, open: Open) {
        let before = std::mem::take(&mut self.nodes);
        self.open.push((open, before));
    }

    fn otherwise(&mut self, rest: &str) -> Result<(), TemplateError> {
        let next = match rest.trim().strip_prefix("if ") {
            Some(condition) => Some(self.pipeline(condition)?),
            None if rest.trim().is_empty() => None,
            None => return Err(self.wrong(format!("`else {rest}` is not understood"))),
        };
        let wrong = self.wrong("`else` without an open `if`");
        let Some((Open::If { cases, condition, has_else: has_else @ false }, _)) = self.open.last_mut() else {
            return Err(wrong);
        };
        *has_else = next.is_none();
        cases.push((std::mem::replace(condition, next), std::mem::take(&mut self.nodes)));
        Ok(())
    }

    fn end(&mut self) -> Result<(), TemplateError> {
        let (open, before) = self.open.pop().ok_or_else(|| self.wrong("`end` without a beginning"))?;
        let inside = std::mem::replace(&mut self.nodes, before);
        match open {
            Open::If { mut cases, condition, .. } => {
                cases.push((condition, inside));
                self.nodes.push(Node::If(cases));
            }
            Open::Range(list) => self.nodes.push(Node::Range(list, inside)),
            Open::Define(name) => drop(self.defined.insert(name, inside)),
        }
        Ok(())
    }

    fn name(&self, quoted: &str) -> Result<String, TemplateError> {
        serde_json::from_str(quoted.trim()).map_err(|_not_quoted| self.wrong(format!("`{quoted}` is not a name in quotes")))
    }

    fn pipeline(&self, text: &str) -> Result<Term, TemplateError> {
        let tokens = tokens(text).ok_or_else(|| self.wrong(format!("`{text}` is not understood")))?;
        let mut tokens = tokens.iter().map(String::as_str).peekable();
        let term = self.stages(&mut tokens)?;
        match tokens.next() {
            None => Ok(term),
            Some(token) => Err(self.wrong(format!("`{token}` is one too many"))),
        }
    }

    /// Commands with `|` between: each is the last argument of the next.
    fn stages<'t>(&self, tokens: &mut std::iter::Peekable<impl Iterator<Item = &'t str>>) -> Result<Term, TemplateError> {
        let mut value: Option<Term> = None;
        loop {
            let mut terms = Vec::new();
            while let Some(token) = tokens.next_if(|token| !matches!(*token, "|" | ")")) {
                terms.push(if token == "(" {
                    let inside = self.stages(tokens)?;
                    if tokens.next() != Some(")") {
                        return Err(self.wrong("`(` without `)`"));
                    }
                    inside
                } else {
                    self.term(token)?
                });
            }
            terms.extend(value.take());
            value = Some(self.command(terms)?);
            if tokens.next_if_eq(&"|").is_none() {
                return value.ok_or_else(|| self.wrong("nothing to evaluate"));
            }
        }
    }

    fn term(&self, token: &str) -> Result<Term, TemplateError> {
        let path = |from_root, names: &str| {
            let names: Vec<String> = names.split('.').filter(|name| !name.is_empty()).map(str::to_owned).collect();
            Term::Path { from_root, names }
        };
        match token.as_bytes().first() {
            Some(b'.') => Ok(path(false, token)),
            Some(b'$') if matches!(token.as_bytes().get(1), None | Some(b'.')) => Ok(path(true, &token[1..])),
            Some(b'"' | b'0'..=b'9') => {
                serde_json::from_str(token).map(Term::Literal).map_err(|_no| self.wrong(format!("`{token}` is no value")))
            }
            Some(byte) if byte.is_ascii_alphabetic() => Ok(Term::Call { name: token.to_owned(), arguments: Vec::new() }),
            _ => Err(self.wrong(format!("`{token}` is not understood"))),
        }
    }

    fn command(&self, terms: Vec<Term>) -> Result<Term, TemplateError> {
        let mut terms = terms.into_iter();
        let head = terms.next().ok_or_else(|| self.wrong("nothing to evaluate"))?;
        let mut arguments: Vec<Term> = terms.collect();
        match head {
            Term::Call { name, arguments: before } if before.is_empty() => Ok(Term::Call { name, arguments }),
            Term::Path { mut names, .. } if names.last().is_some_and(|name| name == "Has") && arguments.len() == 1 => {
                names.pop();
                Ok(Term::Method { names, argument: Box::new(arguments.remove(0)) })
            }
            head if arguments.is_empty() => Ok(head),
            Term::Literal(_) | Term::Path { .. } | Term::Method { .. } | Term::Call { .. } => {
                Err(self.wrong("only functions take arguments"))
            }
        }
    }
}

/// Words, texts in quotes, and the signs `(`, `)` and `|`.
fn tokens(text: &str) -> Option<Vec<String>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '(' | ')' | '|' => 1,
            '"' => rest[1..].find('"')? + 2,
            _ => rest.find(|c: char| c.is_whitespace() || "()|\"".contains(c)).unwrap_or(rest.len()),
        };
        tokens.push(rest[..length].to_owned());
        rest = rest[length..].trim_start();
    }
    Some(tokens)
}
